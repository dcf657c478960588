r"""First-order MAML (Finn et al. 2017, section 5.2; Nichol et al. 2018, section 2).

Inner gradients count as constants, so that the Jacobian of the inner training by gradient descent is the identity, and
the meta-gradient :math:`\nabla L(U(w))`: the gradient of the query loss, where the inner training has led to. It needs
no second derivatives, about half the time and a fraction of the memory.
"""

from typing import ClassVar

from learned_optim.meta_train.few_shot.algorithms.maml import MAML


class FOMAML(MAML):
    """MAML without second derivatives; see the module's formula."""

    second_derivatives: ClassVar[bool] = False
