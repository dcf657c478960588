"""One colour for one contender, in every figure: optimizers and rules, gradient estimators, few-shot algorithms."""

from learned_optim.meta_train.reports.plots import OTHER_COLOUR, colour_of

ESTIMATORS = {
    "TBPTT": "#8c8c8c",
    "ES": "#4c72b0",
    "RP": "#dd8452",
    "combined": "#c44e52",
    "combined, paper's weights": "#937860",
    "PES": "#55a868",
    "ES-Single": "#8172b3",
    "constants": "#ccb974",
}
FEW_SHOT = {
    "maml": "#c44e52",
    "fomaml": "#dd8452",
    "meta-sgd": "#8172b3",
    "reptile": "#55a868",
    "leap": "#64b5cd",
    "meta-lstm": "#937860",
    "maml, rule trained too": "#da8bc3",
    "maml, default rule": "#ccb974",
    "pre-training": "#8c8c8c",
    "scratch": "#333333",
}


def colour(name: str) -> str:
    """The colour of a contender by its name; what stands after a comma is a setting, where it has no colour itself."""
    known = ESTIMATORS | FEW_SHOT
    for candidate in (name, name.partition(", ")[0]):
        if candidate in known:
            return known[candidate]
    return colour_of(name) or OTHER_COLOUR
