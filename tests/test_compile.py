"""Every shipped kernel compiles for every target without a GPU: it fits, spills nothing, and uses the matrix units.

The figures are kept in bench/results, one table for each Triton version, so that a change shows in review. After an
intended change write the table anew: `TRITON_INTERPRET=0 python -m tests.cross_compile --write`. What did not change
since is not compiled again, except for one row of each kernel.
"""

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from backstride.bench.machine_code import AMD, NVIDIA, longest_loop
from backstride.bench.occupancy import issue_share

from .cross_compile import MATRIX_INSTRUCTIONS, TARGETS, Compiled, read_table, table_path, trusted_rows

ROOT = Path(__file__).parents[1]

WITHOUT_PRODUCTS = {
    "batch_norm_gradient_kernel",
    "batch_norm_kernel",
    "batch_norm_moments_finish_kernel",
    "batch_norm_moments_kernel",
    "batch_norm_sums_finish_kernel",
    "batch_norm_sums_kernel",
    "claim_kernel",
    "depthwise_apply_kernel",
    "depthwise_weight_grad_kernel",
    "epilogue_grad_kernel",
    "epilogue_kernel",
    "exchange_probe_kernel",
    "fill_kernel",
    "max_pool_kernel",
    "max_pool_small_kernel",
    "pick_kernel",
    "reduce_splits_kernel",
    "round_kernel",
    "spread_kernel",
    "spread_small_kernel",
    "transpose_kernel",
}

pytestmark = pytest.mark.compile


@pytest.fixture(scope="module", params=list(TARGETS))
def compiled(request, tmp_path_factory):
    """(target, its name, rows) of everything for one target."""
    target = request.param
    # A process of its own, because this one may interpret; a cache of its own, so that what is compiled is.
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.cross_compile", target],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    path = tmp_path_factory.mktemp("table") / "table.csv"
    path.write_text(run.stdout)
    return TARGETS[target], target, read_table(path)


def test_every_kernel_is_compiled(compiled):
    names = {row.kernel for row in compiled[2]}
    assert names == WITHOUT_PRODUCTS | {
        "conv_apply_kernel",
        "conv_apply_transposed_kernel",
        "conv_runs_kernel",
        "conv_runs_weight_grad_kernel",
        "conv_scatter_kernel",
        "conv_weight_grad_kernel",
        "conv_zones_kernel",
        "rnn_resident_kernel",
        "rnn_sharded_kernel",
        "rnn_stepwise_kernel",
    }


def test_nothing_spills(compiled):
    spilled = [row for row in compiled[2] if row.spills]
    assert not spilled


def test_shared_memory_fits(compiled):
    target, _, rows = compiled
    large = [row for row in rows if row.shared > target.shared_memory]
    assert not large


def test_products_run_on_the_matrix_units(compiled):
    """Wide bf16 tiles use the target's own instruction, every other 16-bit or TF32 product some matrix instruction."""
    target, _, rows = compiled
    for row in rows:
        if row.kernel in WITHOUT_PRODUCTS or row.dtype == "fp32":
            continue
        block_m, block_n, *block_k = map(int, row.tile.split()[0].split("x"))
        if row.dtype == "bf16" and min(block_m, block_n) >= 64 and min(block_k) >= 32:
            assert row.matrix_instruction == target.matrix_instruction, row
        assert row.matrix_instruction in MATRIX_INSTRUCTIONS, row


def test_products_outlast_the_instructions_beside_them(compiled):
    """Of large tiles on Hopper: while the matrix units work on one step, the rest of it is issued.

    But for TF32 weight gradients: wgmma wants 32-bit operands with the sum innermost, and theirs lie otherwise. And of
    TF32 tiles only the largest: rounding a row's elements takes as long for half as many columns.
    """
    _, target, rows = compiled
    if target != "sm_90":
        pytest.skip("the tiles are made for Hopper")
    for row in rows:
        blocks = [int(block) for block in row.tile.split()[0].split("x") if block.isdigit()]
        m, n, k = blocks if len(blocks) == 3 else (0, 0, 0)
        large = m * n >= (128 if row.dtype == "tf32" else 64) * 128 and k >= {"bf16": 64, "tf32": 32}.get(
            row.dtype, 256
        )
        gradient = row.kernel == "conv_weight_grad_kernel" and row.dtype == "tf32"
        if row.kernel.startswith("conv") and large and not gradient:
            share = issue_share({name: str(value) for name, value in asdict(row).items()})
            assert share is not None and share < 1, row


def test_figures_are_the_committed_ones(compiled):
    _, target, rows = compiled
    path = table_path()
    if not path.exists():
        pytest.skip(f"no committed table {path.name}")
    committed = [row for row in read_table(path) if row.target == target]
    assert rows == committed, f"the compiler's figures changed: review, then write {path.name} anew"


def test_one_row_of_each_kernel_is_never_trusted():
    light = Compiled("sm_90", "kernel", "a case", "bf16", "64x64 w4 s3", 90, 0, 1024, "wgmma", 100, "key 1")
    heavy = replace(light, case="another", registers=200, key="key 2")
    others = [replace(row, kernel="other kernel", key=f"{row.key} of the other") for row in (light, heavy)]
    rows = [replace(row, target=target) for row in (light, heavy, *others) for target in ("sm_80", "sm_90")]
    compiled = {(row.target, row.key) for row in rows} - set(trusted_rows(rows))
    assert compiled == {("sm_80", "key 2"), ("sm_90", "key 2 of the other")}


def test_loops_are_found_in_both_assemblies():
    nvidia = """
.L_x_0:
        /*0000*/                   IMAD.WIDE R2, R3, 0x2, R4 ;
.L_x_1:
        /*0010*/                   LDG.E R0, [R2] ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
"""
    step = "        /*0030*/                   FADD R1, R1, R0 ;\n"
    branch = "        /*0040*/               @P0 BRA `(.L_x_0) ;\n"
    assert longest_loop(nvidia, NVIDIA) == []  # a wait
    assert len(longest_loop(nvidia + 20 * step + branch, NVIDIA)) == 3 + 20 + 1
    amd = ".LBB0_1:\n" + 20 * "\tv_add_f32 v1, v1, v0\n" + "\t; a comment\n\ts_cbranch_scc1 .LBB0_1\n\ts_endpgm\n"
    assert len(longest_loop(amd, AMD)) == 21
    assert longest_loop(amd.replace(".LBB0_1\n", ".LBB0_2\n"), AMD) == []
