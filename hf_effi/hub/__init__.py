"""Cards, recipes and uploads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "HubCallback": "hf_effi.hub.callback",
    "Recipe": "hf_effi.hub.recipe",
    "from_card": "hf_effi.hub.recipe",
    "read_recipe": "hf_effi.hub.recipe",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from .callback import HubCallback as HubCallback
    from .recipe import Recipe as Recipe
    from .recipe import from_card as from_card
    from .recipe import read_recipe as read_recipe

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
