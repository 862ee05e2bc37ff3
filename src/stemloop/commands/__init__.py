"""The verbs of the command ``stemloop``, one file a subject.

Each module has ``add(verbs)``, which adds its parsers; a parser's default ``do`` is called with the parsed words and
returns the exit status. What a verb needs is imported when it runs, so that ``--help`` answers at once.
"""
