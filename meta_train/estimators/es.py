r"""Evolution strategies: the gradient of the smoothed meta-loss from losses alone.

.. math:: g = \frac 1 K \sum_k \frac{L(w + \varepsilon_k) - L(w - \varepsilon_k)}{2 \sigma^2}\, \varepsilon_k

is an unbiased estimate of :math:`\nabla_w \mathrm E_\varepsilon L(w + \varepsilon)` (antithetic, with common random
numbers; the base of Metz et al. 2019 and Vicol et al. 2021). Nothing is differentiated with respect to the rule, so
memory does not grow with the window, and losses may be as rugged as they like; but the variance grows with the number
of meta-parameters, M.

Over a window of a longer inner training this is *truncated* ES: the state at its start counts as given, and the
estimate is biased as that of truncated backpropagation is. With the window as long as the horizon it is full-unroll
ES, as VeLO was trained with.
"""

from dataclasses import dataclass

from learned_optim.meta_train.estimators.evolution import EvolutionStrategy


@dataclass(frozen=True)
class ES(EvolutionStrategy):
    """Antithetic evolution strategies. The next window starts from where the first particles have come to."""

    name = "es"
    persistent = False
    compares_particles = True
