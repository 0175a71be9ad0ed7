"""Small tools that know nothing of models or caches.

Belongs here: checks of arguments, progress bars, files, memory pages, lists.
Not here: anything that imports torch modules of ours, or a word of the method.
"""
