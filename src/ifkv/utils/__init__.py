"""Small tools that know nothing of models or caches.

Belongs here: checks of arguments, lists, progress bars, huge pages, lazy imports, copying.
Not here: anything about models, caches or the method.
"""
