"""The GPU bench runs as a whole on the CPU, in its tiny mode, and leaves no figure behind."""

from __future__ import annotations

import json

import pytest
import torch

from bench._schema import RESULTS
from bench.gpu import _cases, grpo_exact, run_all
from bench.grpo_exact import ARMS
from hf_effi.errors import RefusedError
from hf_effi.report.result_record import check_record


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    before = sorted(RESULTS.iterdir())
    assert run_all.main(["--dry-run-cpu", "--output", str(folder)]) == 0
    assert sorted(RESULTS.iterdir()) == before
    (path,) = folder.iterdir()
    assert path.name == "kernels_gpu_dry_run.json"
    return json.loads(path.read_text())


def test_the_whole_script_runs(result):
    check_record(result)
    by_name = {item["name"]: item["value"] for item in result["headline"]}
    assert by_name["all_results_correct"] == 1.0
    for name in ("lm_head_fwd_bwd_ms", "lm_head_trl_fwd_bwd_ms", "lora_layer_speedup", "tiled_mlp_vs_checkpoint"):
        assert by_name[name] > 0
    for name in (
        "lora_layer_speedup_autocast",
        "lora_layer_speedup_nf4",
        "shared_prefix_speedup_over_packed_256x2048x4096",
    ):
        assert by_name[name] > 0
    assert by_name["sparse_24_ffn_speedup"] > 0
    lengths = {row["case"].split(", ")[-1] for row in result["rows"] if row["case"].startswith("tiled_mlp, 4 layers")}
    assert lengths == {"8192 tokens", "32768 tokens", "131072 tokens"}
    assert all(row["ok"] for row in result["rows"] if "ok" in row)
    cases = {row["case"].split()[0].rstrip(",") for row in result["rows"]}
    assert cases == {
        "attention_merge",
        "gated_product",
        "lm_head",
        "lora_layer",
        "low_bit_lora",
        "roofline",
        "shared_prefix",
        "sparse_24_ffn",
        "tiled_mlp",
    }
    for name in ("fp8", "int8", "nf4"):
        assert by_name[f"low_bit_lora_{name}_speedup_16384"] > 0
        assert by_name[f"low_bit_lora_{name}_cosine_of_dx_4096"] > 0.95
    assert all(row["peak_mib"] is None for row in result["rows"] if "milliseconds" in row)


def test_what_is_not_installed_is_left_out_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    bench = run_all.Bench(torch.device("cpu"), 0, 1)
    assert "lm_head_trl_fwd_bwd_ms" not in _cases.lm_head(bench)
    assert _cases.lora_layer(bench) == {} == _cases.low_bit_lora(bench)
    assert "trl is not installed" in (shown := capsys.readouterr().out) and "peft is not installed" in shown


def test_a_card_without_fp8_is_left_out_with_the_reason(monkeypatch, capsys):
    def refuse(format, device):
        if format == "fp8":
            raise RefusedError("compute capability 8.0")

    monkeypatch.setattr("hf_effi.kernels.low_bit_lora.check_device", refuse)
    figures = _cases.low_bit_lora(run_all.Bench(torch.device("cpu"), 0, 1))
    assert "low_bit_lora_int8_speedup_4096" in figures and "low_bit_lora_fp8_speedup_4096" not in figures
    assert "fp8 skipped: compute capability 8.0" in capsys.readouterr().out


def test_cases_that_start_too_late_are_left_out():
    bench = run_all.Bench(torch.device("cpu"), 0, 1, limit_seconds=-1.0)
    assert run_all.measure(bench) == {}
    assert {row["case"] for row in bench.rows} == {case.__name__ for case in _cases.CASES}


def test_a_case_that_fails_does_not_cost_the_others(monkeypatch, tmp_path, capsys):
    def broken(bench):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(run_all, "CASES", (_cases.rooflines, broken, _cases.correctness))
    assert run_all.main(["--dry-run-cpu", "--output", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "kernels_gpu_dry_run.json").read_text())
    by_name = {item["name"]: item["value"] for item in result["headline"]}
    assert by_name["gemm_teraflops"] > 0 and by_name["all_results_correct"] == 1.0 and by_name["failed_cases"] == 1.0
    (row,) = (row for row in result["rows"] if row["case"] == "broken")
    assert row["skipped"] == "RuntimeError: an illegal memory access was encountered"
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run-cpu", "--output", str(RESULTS)], "must not be"),
        (["--dry-run-cpu", "--repeats", "0"], "--repeats 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run_all.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        run_all.main([])
    assert "--dry-run-cpu" in capsys.readouterr().err


def test_the_ladder_of_grpo_runs_as_a_whole(tmp_path, monkeypatch):
    """Every arm on the same rollouts; nothing forwards more tokens than stock, nor fewer than there are."""
    monkeypatch.setattr(grpo_exact, "SEEDS", (0,))
    before = sorted(RESULTS.iterdir())
    options = ["--dry-run-cpu", "--output", str(tmp_path), "--limit-seconds", "100000"]
    result = json.loads(grpo_exact.main(options).read_text())
    assert sorted(RESULTS.iterdir()) == before
    check_record(result)
    rows = {(row["prompts"], row["dead_groups"], row["arm"]): row for row in result["rows"]}
    assert len(rows) == len(grpo_exact.PROMPTS) * 2 * len(ARMS) and not any("skipped" in row for row in rows.values())
    for prompts in grpo_exact.PROMPTS:
        tokens = [rows[prompts, 0.0, arm]["tokens_forwarded_per_token_prompts_once"] for arm in ARMS]
        assert tokens[0] == max(tokens) and min(tokens) >= 1.0 and tokens[-1] < tokens[0]


def test_the_ladder_of_grpo_leaves_out_what_would_start_too_late(tmp_path, capsys):
    result = json.loads(
        grpo_exact.main(["--dry-run-cpu", "--output", str(tmp_path), "--limit-seconds", "-1"]).read_text()
    )
    assert all(row["skipped"] == "too late" for row in result["rows"]) and result["headline"] == []
    assert "left out, over -1 s" in capsys.readouterr().out


def test_the_ladder_of_grpo_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        grpo_exact.main([])
    assert "no GPU here" in capsys.readouterr().err
