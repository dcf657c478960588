"""One step of an optimizer, from parameter groups to changed tensors.

:class:`~learned_optim.optimizer.LearnedOptimizer` gathers tensors with gradients and calls what stands here, in this
order: ``counts``, ``settings`` and ``state`` say what the step starts from, ``checks`` refuses what cannot be stepped,
``batches`` groups tensors that one call of the rule serves, and ``dispatch`` chooses ``plain`` or ``fused``, which make
the step. ``programs`` turns a rule into the plan of its kernel. ``particles`` is the step of meta-training. ``modes``
holds what the modes of torch need. Slots, columns and the settings of a step are defined in
:mod:`learned_optim.kernels.slots`.
"""
