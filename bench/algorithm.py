"""Which algorithm ran, read from the names of a call's GPU kernels: cuDNN does not tell its choice in any other way."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from re import Match

from .. import kernels

UNKNOWN = "unknown"
Label = tuple[str, str]  # a pattern, case aside, and what it means; {name} stands for a group of the pattern

# The first that is found counts. The names are those of cuDNN 7 to 9, cuBLAS, CUTLASS, torch and Inductor in published
# profiles. A direction (fprop, dgrad, wgrad) or architecture is said only where the name says it.
LABELS: list[Label] = [
    # Inductor's, which name all that they fuse.
    ("triton_tem_", "Inductor's template"),
    ("triton_(red|per|mix)_", "Inductor's reduction"),
    ("triton_poi_", "Inductor's pointwise"),
    # Layouts, and what prepares a convolution.
    ("nchwToNhwc", "NCHW to NHWC"),
    ("nhwcToNchw", "NHWC to NCHW"),
    ("ToFoldedNhwc|foldedNhwcTo", "folding of NHWC"),
    ("genericTranspose|transpose_readWrite", "transpose"),
    ("convertTensor", "conversion of layout or dtype"),
    ("(nchw|nhwc)AddPadding", "padding of channels"),
    (r"precompute_indices|compute\w*offsets", "table of indices"),
    ("flip_filter", "flip of the filter"),
    # cuDNN's recurrences: the persistent algorithms are one launch for all steps, the standard one has cells.
    (r"RNN_blockPersist_(?P<pass>[fb]p)_\w*HMMA", "persistent RNN {pass}, tensor cores"),
    ("RNN_blockPersist_(?P<pass>[fb]p)", "persistent RNN {pass}"),
    ("persistRNN_(init|addBias)", "preparation of a persistent RNN"),
    (r"persist\w*RNN|RNN\w*persist", "persistent RNN"),
    ("elemWiseRNNcell", "standard RNN, cell of one step"),
    ("(RNN|LSTM|GRU)_elementWise_(?P<pass>[fb]p)", "standard RNN, cell of one step {pass}"),
    # Convolutions. Depthwise ones first: their names hold those of the others.
    (r"conv_depthwise[23]d\w*(grad_weight|backward_weight)", "direct depthwise wgrad, torch's own"),
    (r"conv_depthwise[23]d\w*backward", "direct depthwise dgrad, torch's own"),
    ("conv_depthwise[23]d", "direct depthwise fprop, torch's own"),
    (r"sm(?P<arch>\d+)_xmma_depthwise_convolution_(?P<way>fprop|dgrad|wgrad)", "direct depthwise {way}, xmma sm{arch}"),
    ("(?P<way>conv|dgrad|wgrad)2d_c1_k1_nhwc", "direct depthwise {way}, cuDNN NHWC"),
    ("(?P<way>conv|dgrad|wgrad)2d_grouped_direct", "direct grouped {way}, cuDNN"),
    ("winograd", "Winograd"),
    ("fft[12]d_|regular_fft|vector_fft|composite_2way_fft", "FFT"),
    (r"g?cgemm_\d", "complex GEMM, of an FFT"),
    (r"sm(?P<arch>\d+)_xmma_(?P<way>fprop|dgrad|wgrad)_implicit_gemm", "implicit GEMM {way}, xmma sm{arch}"),
    (r"xmma\w*::implicit_gemm::(strided_)?(?P<way>fprop|dgrad|wgrad)", "implicit GEMM {way}, xmma"),
    (r"cutlass3x_sm(?P<arch>\d+)_\w*(?P<way>fprop|dgrad|wgrad)", "implicit GEMM {way}, CUTLASS sm{arch}"),
    (r"cutlass\w*_(?P<arch>\d\d)_tensorop_\w*(?P<way>fprop|dgrad|wgrad)", "implicit GEMM {way}, CUTLASS sm{arch}"),
    (r"cutlass\w*_tensorop_\w*(?P<way>fprop|dgrad|wgrad)", "implicit GEMM {way}, CUTLASS tensor cores"),
    (r"cutlass\w*_simt_\w*(?P<way>fprop|dgrad|wgrad)", "implicit GEMM {way}, CUTLASS without tensor cores"),
    ("hmma_implicit_gemm_(?P<way>fprop|dgrad|wgrad)", "implicit GEMM {way}, cuDNN tensor cores"),
    (r"[hs](884|1688|16816)cudnn\w*(?P<way>fprop|dgrad|wgrad)", "implicit GEMM {way}, cuDNN tensor cores"),
    ("[hs](884|1688|16816)cudnn", "implicit GEMM, cuDNN tensor cores"),
    ("scudnn|implicit_convolve", "implicit GEMM, cuDNN without tensor cores"),
    ("explicit_convolve", "explicit GEMM, cuDNN"),
    (r"(?P<way>dgrad|wgrad)(2d)?_(alg\d|engine)", "{way} engine, cuDNN"),
    ("im2col|vol2col", "im2col"),
    ("col2im|col2vol", "col2im"),
    # Matrix products: of a recurrence's steps, of 1x1 convolutions, behind im2col and Winograd.
    ("splitKreduce", "sum of a split GEMM"),
    ("gemv", "matrix-vector product"),
    ("nvjet", "GEMM, cuBLAS tensor cores"),
    (r"tensorop\w*gemm|[hs](884|1688|16816)gemm|xmma_gemm", "GEMM, tensor cores"),
    (r"simt_\w*gemm|_[sd]gemm", "GEMM without tensor cores"),
    ("gemm", "GEMM"),
    # Batch normalisation.
    ("bn_bw|batchnorm_bw", "backward of batch normalisation, cuDNN"),
    ("bn_fw|batchnorm_fw", "batch normalisation, cuDNN"),
    ("batch_norm_backward", "backward of batch normalisation, torch's own"),
    ("batch_norm_", "batch normalisation, torch's own"),
    # torch's own.
    ("max_pool_backward|max_pool3d_with_indices_backward", "backward of max-pooling, torch's own"),
    ("max_pool_forward|max_pool3d_with_indices", "max-pooling, torch's own"),
    (r"max_?unpool\w*forward", "max-unpooling, torch's own"),
    (r"max_?unpool\w*backward", "backward of max-unpooling, torch's own"),
    ("CatArray", "concatenation"),
    ("Memset|FillFunctor", "fill"),
    ("Memcpy|copy_kernel", "copy"),
    ("elementwise_kernel", "elementwise"),
    (r"at::native::\w*reduce_kernel", "reduction"),
]
WORDS = {"fp": "forward", "bp": "backward", "conv": "fprop"}
PATTERNS = [(re.compile(pattern, re.IGNORECASE), words) for pattern, words in LABELS]


@lru_cache
def our_kernels() -> frozenset[str]:
    """The names of this package's kernels."""
    sources = Path(str(kernels.__file__)).parent.rglob("*.py")
    return frozenset(
        name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.MULTILINE)
    )


def label(name: str) -> str:
    """What a GPU kernel of this name does; `unknown` and the name, where that does not tell."""
    if name in our_kernels():
        return f"ours: {name}"
    found: Match[str] | None
    for pattern, words in PATTERNS:
        if found := pattern.search(name):
            groups = {key: value.lower() for key, value in found.groupdict().items()}
            return words.format(**{key: WORDS.get(value, value) for key, value in groups.items()})
    return f"{UNKNOWN}: {name[:80]}"


def algorithm(launches: Iterable[tuple[int, str]]) -> str:
    """The labels of a call's kernels in the order given, from the number of launches and the name of each.

    "implicit GEMM fprop, xmma sm90; 2 x NCHW to NHWC; NHWC to NCHW; elementwise": layout changes are counted, and a
    recurrence whose products have a launch for each step shows that by their number.
    """
    counts: dict[str, int] = {}
    for count, name in launches:
        words = label(name)
        counts[words] = counts.get(words, 0) + count
    return "; ".join(words if count == 1 else f"{count} x {words}" for words, count in counts.items())
