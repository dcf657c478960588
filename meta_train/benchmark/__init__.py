"""The benchmark: suites of problems, tuned baselines, a cache of runs, scores, tables and figures."""

from learned_optim.meta_train.common.provenance import provenance, save_rows

__all__ = ["provenance", "save_rows"]
