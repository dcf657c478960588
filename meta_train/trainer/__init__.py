"""The meta-training loop, and what it leaves on disk.

``kind`` begins and resumes runs. ``loop`` holds what all runs have in common, ``trainer`` the run that trains a rule.
``pool`` and ``member`` are the inner trainings under way, from which a step takes its meta-gradient;
``meta_optimizer`` applies it. ``validation`` and ``curriculum`` judge the rule, ``checkpoint``, ``log`` and ``record``
write files, and ``progress`` shows how far the run is.
"""
