"""Meta-training: tasks, unrolls, gradient estimators and the trainer that produces new update rules.

``learned-optim meta-train`` (``learned_optim/cli/meta_train.py``) reads a configuration and begins or resumes a run by
``trainer.kind``, and ``trainer.progress`` goes through its steps. A meta-step takes this way:
``MetaTraining.run`` (``trainer.loop``) calls ``Trainer._step`` (``trainer.trainer``), which asks for
``Pool.meta_gradient`` (``trainer.pool``). The pool takes a window of an inner training, in which the estimator makes
the meta-gradient: ``Estimator.train_share`` and ``combine`` (``estimators``), by the unrolls of ``inner``.

Each room imports only from rooms before it: ``common``, ``data``, ``style_transfer``, ``tasks``, ``inner``,
``estimators``, ``config``, ``trainer``, ``benchmark``, ``reports``, and last ``few_shot``. Shipped configurations are
in ``configs/``, the suites of ``learned-optim benchmark`` in ``suites/``.
"""
