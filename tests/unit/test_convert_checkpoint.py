"""Checkpoints of one process and of FSDP2, converted into each other by one process, or refused by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_effi.checkpoint import convert_checkpoint, verify_checkpoint
from hf_effi.checkpoint.dcp_files import read_sharded, write_sharded
from hf_effi.checkpoint.manifest import MANIFEST, read_manifest
from hf_effi.checkpoint.parameter_order import groups_of_a_trainer
from hf_effi.cli import main
from hf_effi.errors import BrokenFileError, RefusedError
from tests.helpers import tiny_qwen3


def optimizer_of(model: torch.nn.Module, groups: list[list[str]], **over: Any) -> torch.optim.Optimizer:
    parameters = dict(model.named_parameters())
    made = torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in names], "weight_decay": decay}
            for names, decay in zip(groups, (0.1, 0.0), strict=False)
        ],
        **over,
    )
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.01 * (index + 1))
    made.step()
    return made


def saved(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer | None = None) -> Path:
    """Write what a stock Trainer writes at update 3."""
    model.save_pretrained(folder)
    if optimizer is None:
        optimizer = optimizer_of(model, groups_of_a_trainer(model))
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"last_epoch": 3}, folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("tied") / "checkpoint-3", tiny_qwen3(tie_word_embeddings=True))


def test_the_groups_are_those_of_a_trainer(tmp_path: Path) -> None:
    from transformers import Trainer

    from tests.helpers import push_args

    for model in (tiny_qwen3(tie_word_embeddings=True), torch.nn.TransformerEncoderLayer(8, 2, 16)):
        optimizer = Trainer(model, push_args(tmp_path)).create_optimizer()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert groups_of_a_trainer(model) == [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]


def test_there_and_back_is_what_it_was(tied: Path, tmp_path: Path) -> None:
    there = convert_checkpoint(tied, tmp_path / "a" / "checkpoint-3", to="fsdp2")
    assert verify_checkpoint(there).problem is None and verify_checkpoint(there).sealed
    assert not list(there.glob("*.safetensors")) and not (there / "optimizer.pt").exists()
    weights = read_sharded(there / "pytorch_model_fsdp_0")["model"]
    expected = tiny_qwen3(tie_word_embeddings=True).state_dict().keys()
    assert list(weights) == list(expected), "under both names of the tied weight"
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    optimizer = read_sharded(there / "optimizer_0")["optimizer"]
    assert set(optimizer["state"]) == set(weights) - {"lm_head.weight"}
    # Adam's first state is 0.1 times the gradient, which is 0.01 times the place of the parameter in the model.
    for place, (name, _) in enumerate(tiny_qwen3(tie_word_embeddings=True).named_parameters(), start=1):
        assert optimizer["state"][name]["exp_avg"].mean().item() == pytest.approx(0.001 * place)
    back = convert_checkpoint(there, tmp_path / "b" / "checkpoint-3", to="single")
    first, last = (torch.load(folder / "optimizer.pt") for folder in (tied, back))
    assert str(first) == str(last) and list(first["state"]) == list(last["state"])
    before, after = load_file(tied / "model.safetensors"), load_file(back / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for name in ("scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"):
        assert (back / name).read_bytes() == (tied / name).read_bytes()
    assert read_manifest(back)["optimizer_parameters"] == groups_of_a_trainer(tiny_qwen3(tie_word_embeddings=True))


def test_names_of_a_manifest_come_first(tmp_path: Path) -> None:
    """An optimizer in an order of its own, whose shapes would fit another order as well."""
    model = tiny_qwen3()
    own = [list(reversed([name for name, _ in model.named_parameters()]))]
    folder = saved(tmp_path / "checkpoint-3", model, optimizer_of(model, own))
    with pytest.raises(RefusedError, match="does not fit the parameters of this model in order: .* has the shape"):
        convert_checkpoint(folder, tmp_path / "a", to="fsdp2")
    manifest = {"schema": 1, "step": 3, "files": {}, "optimizer_parameters": own, "world_size": 1}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / "config.json").unlink()  # the names alone are enough
    made = convert_checkpoint(folder, tmp_path / "b", to="fsdp2")
    optimizer = read_sharded(made / "optimizer_0")["optimizer"]
    assert optimizer["param_groups"][0]["params"] == own[0] and read_manifest(made)["world_size"] == 1
    last = optimizer["state"][own[0][0]]["exp_avg"]
    assert last.mean().item() == pytest.approx(0.001 * len(own[0]))


def frozen(folder: Path) -> None:
    model = tiny_qwen3()
    saved(folder, model, optimizer_of(model, [names[1:] for names in groups_of_a_trainer(model)]))


def unknown(folder: Path) -> None:
    saved(folder, tiny_qwen3())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MyModel"]}))


def without_config(folder: Path) -> None:
    (saved(folder, tiny_qwen3()) / "config.json").unlink()


def adapter(folder: Path) -> None:
    (saved(folder, tiny_qwen3()) / "adapter_config.json").write_text("{}")


def of_deepspeed(folder: Path) -> None:
    (saved(folder, tiny_qwen3()) / "global_step3").mkdir()


def factored(folder: Path) -> None:
    model = tiny_qwen3()
    optimizer = optimizer_of(model, groups_of_a_trainer(model))
    optimizer.state[next(model.parameters())]["row"] = torch.zeros(7)
    saved(folder, model, optimizer)


def outside(folder: Path) -> None:
    saved(folder, tiny_qwen3())
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def huge(folder: Path) -> None:
    """A model that would take hours to build, without weights too."""
    path = saved(folder, tiny_qwen3()) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 10**5, "layer_types": None}))


def no_mapping(folder: Path) -> None:
    (saved(folder, tiny_qwen3()) / "config.json").write_text("[1]")


def no_map_of_weights(folder: Path) -> None:
    saved(folder, tiny_qwen3())
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "model.safetensors"}}')
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


def no_optimizer(folder: Path) -> None:
    torch.save([1, 2], saved(folder, tiny_qwen3()) / "optimizer.pt")


def cut(folder: Path) -> None:
    path = saved(folder, tiny_qwen3()) / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:999])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (frozen, RefusedError, r"its groups have \[\d+, \d+\] parameters where those have"),
        (unknown, RefusedError, r"\(MyModel\) is none of transformers, and code of others is not run"),
        (without_config, RefusedError, "there is no config.json to build the model from"),
        (adapter, RefusedError, "holds an adapter of PEFT"),
        (of_deepspeed, RefusedError, "is of DeepSpeed"),
        (factored, RefusedError, r"has row of the shape \[7\].*FSDP2 cannot shard"),
        (outside, BrokenFileError, r"names '../model.safetensors', which is not in its folder"),
        (huge, RefusedError, "cannot be built: .*it has more than 200 parameters"),
        (no_mapping, RefusedError, "config.json is no mapping"),
        (no_map_of_weights, BrokenFileError, "weight_map"),
        (no_optimizer, BrokenFileError, "optimizer.pt is no state of an optimizer of PyTorch"),
        (cut, BrokenFileError, "is not whole: optimizer.pt ends early"),
    ],
)
def test_what_cannot_be_converted(tmp_path: Path, make: Any, error: type[Exception], message: str) -> None:
    folder = tmp_path / "checkpoint-3"
    make(folder)
    with pytest.raises(error, match=message):
        convert_checkpoint(folder, tmp_path / "made" / "checkpoint-3", to="fsdp2")
    assert not (tmp_path / "made").exists() or not list((tmp_path / "made").iterdir())


def test_arguments_out_of_range(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to='ddp' is not one of 'single', 'fsdp2'"):
        convert_checkpoint(tied, tmp_path / "a", to="ddp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has the layout 'single' already"):
        convert_checkpoint(tied, tmp_path / "a", to="single")
    with pytest.raises(ValueError, match="exists already"):
        convert_checkpoint(tied, tmp_path, to="fsdp2")
    with pytest.raises(ValueError, match="checkpoint-4 would hold update 3"):
        convert_checkpoint(tied, tmp_path / "checkpoint-4", to="fsdp2")


def test_what_is_in_a_sharded_state_is_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harmed"),)

    def named(name: str) -> Any:
        write_sharded(tmp_path / name, {"x": torch.ones(2)})
        path = tmp_path / name / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        for where in metadata.storage_data.values():
            where.relative_path = "/dev/zero" if name == "device" else "../state/__0_0.distcp"
        path.write_bytes(pickle.dumps(metadata))
        return tmp_path / name

    write_sharded(tmp_path / "state", {"x": {"tensor": torch.ones(2), "number": 3}})
    for folder, told in ((named("device"), "/dev/zero"), (named("outside"), "../state/__0_0.distcp")):
        with pytest.raises(BrokenFileError, match=f"names '?{told}'?, which is no file in it"):
            read_sharded(folder)
    assert str(read_sharded(tmp_path / "state")) == str({"x": {"tensor": torch.ones(2), "number": 3}})
    (tmp_path / "state" / ".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(BrokenFileError, match="it asks for posix.mkdir"):
        read_sharded(tmp_path / "state")
    assert not (tmp_path / "harmed").exists()


def test_from_the_shell(tied: Path, tmp_path: Path, capsys: Any) -> None:
    made = tmp_path / "checkpoint-3"
    assert main(["checkpoint", "convert", str(tied), str(made), "--to", "fsdp2"]) == 0
    assert str(made) in capsys.readouterr().out and verify_checkpoint(made).whole
    assert main(["checkpoint", "convert", str(tied), str(made), "--to", "fsdp2"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["checkpoint", "convert", str(tmp_path / "none"), str(made), "--to", "fsdp2", "--json"]) == 1
    shutil.rmtree(made)
    assert main(["checkpoint", "convert", str(tied), str(made), "--to", "fsdp2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(made), "layout": "fsdp2"}


def test_weights_alone(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    save_file({"weight": torch.ones(2, 3)}, folder / "model.safetensors")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    made = convert_checkpoint(folder, tmp_path / "a", to="fsdp2")
    assert str(read_sharded(made / "pytorch_model_fsdp_0")["model"]) == str({"weight": torch.ones(2, 3)})
    assert not (made / "optimizer_0").exists()
