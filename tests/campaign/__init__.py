"""A seeded campaign of malformed and odd requests, checked by a judge that shares no code with the package.

* :mod:`tests.campaign.vocabularies`: tokenizers of every make, and what each of their tokens covers.
* :mod:`tests.campaign.facts`: facts in several scripts, and the forms and files that they are written in.
* :mod:`tests.campaign.mutations`, :mod:`tests.campaign.wrong_types`, :mod:`tests.campaign.odd_files`: what is done to
  a fact, and what must come of it: it is read as it was meant (``right``), or refused with a message that names a field
  (``refused``), or one of the two (``safe``).
* :mod:`tests.campaign.judge`: what reading it as it was meant is: texts, subject span, lookup token, target ids.
* :mod:`tests.campaign.trials`: one case put to the package, with a clock, and what is wrong with the answer.

Every case has a name such as ``7/short/subject_edges/3`` from which it is made again; try one alone with
``python -m tests.campaign 7/short/subject_edges/3``.
"""
