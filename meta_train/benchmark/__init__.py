"""The benchmark: suites of problems, tuned baselines, a cache of runs, scores, tables and figures."""
