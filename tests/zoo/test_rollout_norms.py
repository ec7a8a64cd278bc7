"""
Every causal class has norms that noise can be added to, or is refused by name; the noise comes off to the bit.

Sharded as `test_zoo.py`: a sixteenth of the classes by default, all with `HF_EFFI_ZOO=all`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_effi.errors import RefusedError
from hf_effi.trainers.grpo.norms import find_norms
from tests.zoo.builders import CannotBuild, build, families
from tests.zoo.run import in_shard, read_shard

SHARD = read_shard()
#: classes whose norms have no parameters, or none at all; what is refused beside these does not run on plain tokens
WITHOUT = {"DoryForCausalLM", "HrmTextForCausalLM", "NanoChatForCausalLM", "OlmoForCausalLM"}

pytestmark = pytest.mark.filterwarnings("ignore")


def norms_of(model: nn.Module) -> dict[str, nn.Parameter] | str:
    try:
        return find_norms(model)
    except RefusedError as error:
        return str(error)


def test_norms_are_found_or_the_class_is_refused_by_name() -> None:
    found = refused = 0
    for family in families("causal"):
        if not in_shard(family, "rollout noise", SHARD):
            continue
        try:
            model = build(family, dtype=torch.float32).model
        except CannotBuild:
            continue
        before = {name: value.clone() for name, value in model.state_dict().items()}
        norms = norms_of(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), family.name
        if isinstance(norms, str):
            refused += 1
            assert ("has no layer that scales" in norms) == (family.name in WITHOUT), f"{family.name}: {norms}"
            assert family.name in WITHOUT or "does not run on" in norms, f"{family.name}: {norms}"
            continue
        found += 1
        widths = {scale.numel() for scale in norms.values()}
        assert len(widths) == 1 and len(norms) >= 2, f"{family.name}: {list(norms)}"
    assert found > 10 * refused
