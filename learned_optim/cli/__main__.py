"""``python -m learned_optim.cli``, for launchers such as torchrun that start a module."""

import sys

from learned_optim.cli import main

sys.exit(main())
