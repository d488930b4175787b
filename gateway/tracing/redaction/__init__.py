"""Taking out what is personal or secret, before anything leaves the process or touches a disk.

``redactor`` is the one choke point; ``patterns`` says what is looked for, ``checks`` what a pattern cannot express,
``fields`` what a name gives away, ``canonical`` when two ways of writing are one value; ``plain`` and ``walk`` take
values apart.
"""
