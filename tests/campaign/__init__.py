"""A seeded campaign of malformed and odd requests, checked by a judge that shares no code with the package.

* :mod:`tests.campaign.vocabularies`: tokenizers of every make, and what each of their tokens covers.
* :mod:`tests.campaign.facts`: facts in several scripts, and the forms that they are written in.
* :mod:`tests.campaign.subjects`, :mod:`tests.campaign.texts`, :mod:`tests.campaign.wrong_types`,
  :mod:`tests.campaign.odd_files`, :mod:`tests.campaign.odd_yaml`: what is done to a fact, and what must come of it.
  It is read as it was meant (``right``), or refused with a message that names a field (``refused``), or one of the
  two (``safe``).
* :mod:`tests.campaign.judge`: what reading it as it was meant is: texts, subject span, lookup token, target ids.
* :mod:`tests.campaign.trials`: one case put to the package, with a clock; :mod:`tests.campaign.comparison`: what is
  wrong with the answer; :mod:`tests.campaign.figures`: how many.

Every case has a name such as ``7/short/subject_edges/3`` from which it is made again. Try one alone with
``python -m tests.campaign 7/short/subject_edges/3``, or some of every form with
``python -m tests.campaign subject_edges``.
"""
