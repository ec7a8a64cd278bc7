"""Rows of the table: how a long sequence fits: tiles, chunks, offload, sequence parallelism."""

from __future__ import annotations

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="tiled_mlp",
        title="TiledMLP",
        kind="parallel",
        summary="Computes gated MLPs in tiles of tokens, so that their activations exist for one tile at a time.",
        entry_points=("hf_effi.parallel.tiled_mlp:tile_mlp", "hf_effi.callbacks.patch:PatchCallback"),
        paper="Arctic Long Sequence Training: Scalable And Efficient Training For Multi-Million Token Sequences",
        paper_id="2506.13996",
        status="experimental",
        tests=(
            "tests/unit/test_tiled_mlp.py",
            "tests/training/test_tiled_mlp.py",
            "tests/distributed/test_tiled_ranks.py",
        ),
        bench="bench/tiled_compute.py",
    ),
    Method(
        key="tiled_loss",
        title="Tiled loss",
        kind="parallel",
        summary="Computes the next-token loss of a plain Trainer in tiles of tokens, without ever making the logits.",
        entry_points=("hf_effi.parallel.tiled_loss:tile_loss", "hf_effi.parallel.tiled_loss:tiled_cross_entropy"),
        paper="Arctic Long Sequence Training: Scalable And Efficient Training For Multi-Million Token Sequences",
        paper_id="2506.13996",
        status="experimental",
        tests=(
            "tests/unit/test_tiled_loss.py",
            "tests/training/test_tiled_loss.py",
            "tests/distributed/test_tiled_ranks.py",
        ),
        bench="bench/tiled_compute.py",
    ),
    Method(
        key="stream_layer",
        title="StreamLayer (StreamBP)",
        kind="parallel",
        summary="Runs a decoder layer's backward a chunk of tokens at a time, through the layer's own code.",
        entry_points=("hf_effi.parallel.stream_layer:stream_layers",),
        paper="StreamBP: Memory-Efficient Exact Backpropagation for Long Sequence Training of LLMs",
        paper_id="2506.03077",
        status="experimental",
        tests=(
            "tests/unit/test_stream_layer.py",
            "tests/training/test_stream_layer.py",
            "tests/distributed/test_tiled_ranks.py",
        ),
        bench="bench/tiled_compute.py",
    ),
)
