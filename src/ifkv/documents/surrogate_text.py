"""The surrogate text that ifkv ships: two short encyclopedic passages, written for the purpose.

Of the texts that were tried (docs/explanations/surrogate.md), passages that look like documents of
a corpus did best, and two in a row did as well as four, or as the mean over two pairs. It is a
fixed text, so that nobody's documents can influence another's (docs/explanations/security.md).
Whatever is changed here changes the key of every document that was encoded behind it.
"""

# What stands for the text where texts are named by files.
DEFAULT = "default"

SURROGATE_TEXT = """\
The Old Harbour Bridge
The Old Harbour Bridge is a stone road bridge across the mouth of a small river on the northern \
coast. It was designed by a local engineer, built between 1874 and 1879, and opened in the spring \
of that year by the mayor of the town. The bridge has seven arches, is 212 metres long, and \
replaced a wooden crossing that had been destroyed by a flood. During the following century it was \
widened twice, first for a tramway and later for cars. Since 1986 it has been protected as a \
monument, and heavy traffic uses a newer bridge further upstream. Every summer a festival with \
boats and music is held beneath it.

Helen Marsh (musician)
Helen Marsh (born 14 March 1951) is a singer, songwriter and actress. She grew up in a family of \
teachers, studied piano and history at university, and released her first album in 1973 with the \
group that she had founded with her brother. Her second record reached number four in the national \
charts and stayed there for eleven weeks. In the 1980s she turned to film, where she played the \
lead in three dramas and received an award for best supporting actress. She has written two books \
about her early years, and she teaches composition. Her daughter is the director of a children's \
choir.
"""
