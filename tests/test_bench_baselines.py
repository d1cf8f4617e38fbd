"""What ours is compared with: torch.compile in both layouts, and the algorithm that a baseline's kernels tell."""

import pytest
import torch
from backstride.bench import bench_batch_norm, bench_conv, bench_networks, bench_pool, bench_pyramid, timing
from backstride.bench.algorithm import UNKNOWN, algorithm, label
from backstride.bench.case import Variant, run_case, variants
from backstride.bench.timing import WARM_UP, kernels_between_marks

CONV = bench_conv.case(bench_conv.Layer("layer", 2, 3, 5, (6, 7), 3, 2, 1), "forward", torch.float32)
POOL, ROUND_TRIP = bench_pool.cases(True, True)[:2]
PYRAMID = bench_pyramid.cases(True, True)[1]
BATCH_NORM = bench_batch_norm.cases(True, True)[1]
NETWORK = bench_networks.case(bench_networks.NETWORKS[0].tiny(), torch.float32)


class Backend:
    """Of torch.compile: notes what it is given to compile, and runs that as it is."""

    def __init__(self) -> None:
        self.graphs: list[tuple[bool, int]] = []  # whether its first image is channels_last; number of results

    def __call__(self, graph, inputs):
        image = next(t for t in inputs if t.dim() == 4)
        results = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        self.graphs.append((image.stride(1) == 1, len(results)))
        return graph


@pytest.fixture
def backend(monkeypatch):
    result, compile = Backend(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, mode, dynamic: compile(call, backend=result, dynamic=dynamic))
    yield result
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("case", "results"),
    [(CONV, [1]), (POOL, [2]), (ROUND_TRIP, [2, 1]), (PYRAMID, [1]), (BATCH_NORM, [1]), (NETWORK, None)],
    ids=["convolution", "pooling", "unpooling", "pyramid in training", "batch normalisation in training", "network"],
)
def test_both_layouts_are_compiled_in_the_warm_up(backend, case, results):
    """And not when they are timed. Pooling has to return its indices: what nobody wants would not be computed."""
    calls = {v: call for v, call in variants(case, "cpu", compiled=True).items() if v.name == "torch.compile"}
    assert {v.layout for v in calls} == {"contiguous", "channels_last"}
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    compiled = list(backend.graphs)
    for call in calls.values():
        call()
    assert backend.graphs == compiled
    assert {last for last, _ in compiled} == {False, True}
    if results:
        assert [n for last, n in compiled if last] == results


def test_compiled_baselines_are_checked_too(backend):
    errors = run_case(CONV, "cpu", None, True).errors
    assert errors[Variant("torch.compile", "channels_last")] < 1e-5


# As profilers show them, template arguments cut.
NAMES = {
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1"
    "_execute_segment_k_off_kernel__5x_cudnn": "implicit GEMM fprop, xmma sm90",
    "sm80_xmma_wgrad_implicit_gemm_indexed_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize64x64x64_stage4_warpsize1x1x4_g8"
    "_tensor16x8x16_execute_kernel__5x_cudnn": "implicit GEMM wgrad, xmma sm80",
    "sm80_xmma_fprop_implicit_gemm_indexed_wo_smem_bf16bf16": "implicit GEMM fprop, xmma sm80",
    "void xmma_cudnn::gemm::kernel<xmma_cudnn::implicit_gemm::strided_dgrad_indexed::Kernel_traits<>>": (
        "implicit GEMM dgrad, xmma"
    ),
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_s1688wgrad_optimized_tf32_256x128_16x3_nhwc_align4>(Params)": (
        "implicit GEMM wgrad, CUTLASS tensor cores"
    ),
    "cutlass3x_sm100_tensorop_s256x256x16implicit_gemm_fprop_bf16_bf16_f32_void_bf16_f32_256x128x64_dyn_cga_ndhwc": (
        "implicit GEMM fprop, CUTLASS sm100"
    ),
    "volta_fp16_s884cudnn_fp16_256x128_ldg8_relu_f2f_exp_small_nhwc2nchw_tn_v1": "implicit GEMM, cuDNN tensor cores",
    "Volta_hmma_implicit_gemm_fprop_fp32_nhwc_128x128x64x1_1x3x3x0x1": "implicit GEMM fprop, cuDNN tensor cores",
    "ampere_scudnn_128x64_relu_interior_nn_v1": "implicit GEMM, cuDNN without tensor cores",
    "void implicit_convolve_sgemm<__half, __half, 1024, 5, 5, 3, 3, 3, 1>": "implicit GEMM, cuDNN without tensor cores",
    "void cudnn::cnn::wgrad_alg0_engine<float, 512, 6, 5, 3, 3, 3, false, 512>": "wgrad engine, cuDNN",
    "_5x_cudnn_ampere_scudnn_winograd_128x128_ldg1_ldg4_relu_tile148t_nt_v1": "Winograd",
    "void cudnn::winograd_nonfused::winogradForwardOutput4x4<float, float>": "Winograd",
    "void fft2d_r2c_32x32<__half, false, 5u, true>(float2*, __half const*, int)": "FFT",
    "volta_gcgemm_32x32_nt": "complex GEMM, of an FFT",
    "void cudnn::cnn::conv2d_grouped_direct_kernel<false, true, false, false>": "direct grouped fprop, cuDNN",
    "void dgrad2d_grouped_direct_kernel<float, float, float, true, 0, 1>": "direct grouped dgrad, cuDNN",
    "void conv2d_c1_k1_nhwc_kernel_specialized<__half, __half, __half, float, float, 5, 1, 8, 3, true>": (
        "direct depthwise fprop, cuDNN NHWC"
    ),
    "void cudnn::cnn::wgrad2d_c1_k1_nhwc_reduction_kernel<__half, float, 8>": "direct depthwise wgrad, cuDNN NHWC",
    "sm80_xmma_depthwise_convolution_dgrad_tiling_f16f16_f32f32_f32_nhwckrsc_nhwc_tilesize1x8x8": (
        "direct depthwise dgrad, xmma sm80"
    ),
    "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, c10::BFloat16, int>": (
        "direct depthwise fprop, torch's own"
    ),
    "void at::native::(anonymous namespace)::conv_depthwise2d_grad_weight_kernel<float, unsigned int>": (
        "direct depthwise wgrad, torch's own"
    ),
    "conv_depthwise3d_cuda_backward_input_kernel": "direct depthwise dgrad, torch's own",
    "_ZN2at6native51_GLOBAL__N__67b3c33b_18_DepthwiseConv2d_cu_conv_depthwise2d_forward_kernelILi5EfiE": (
        "direct depthwise fprop, torch's own"
    ),
    "void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true, (cudnnKernelDataType_t)0>": "NCHW to NHWC",
    "void cudnn::engines_precompiled::nhwcToNchwKernel<float, float, float, false>": "NHWC to NCHW",
    "genericTranspose_kernel": "transpose",
    "void cudnn::ops::nhwcAddPaddingKernel<__half>": "padding of channels",
    "cask__5x_cudnn::computeOffsetsKernel<false, false>": "table of indices",
    "void at::native::im2col_kernel<float>": "im2col",
    "void at::native::vol2col_kernel<float>": "im2col",
    "void at::native::col2im_kernel<float, float>": "col2im",
    "void RNN_blockPersist_fp_RNN_HMMA<__half>": "persistent RNN forward, tensor cores",
    "RNN_blockPersist_bp_GRU<float, float, float, 128>": "persistent RNN backward",
    "persistRNN_addBias<float, float>": "preparation of a persistent RNN",
    "void elemWiseRNNcell<float, float, float, (cudnnRNNMode_t)0, (cudnnRNNBiasMode_t)2>": (
        "standard RNN, cell of one step"
    ),
    "void RNN_elementWise_bp1<float, float, float>(int, int)": "standard RNN, cell of one step backward",
    "nvjet_tst_112x64_64x9_2x1_v_bz_bias_TNN": "GEMM, cuBLAS tensor cores",
    "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x128_16x5_nt_align4>(Params)": "GEMM, tensor cores",
    "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_32x6_tn": "GEMM, tensor cores",
    "void cutlass::Kernel2<cutlass_80_simt_sgemm_256x128_8x4_nn_align1>": "GEMM without tensor cores",
    "ampere_sgemm_32x128_tn": "GEMM without tensor cores",
    "void gemvNSP_kernel<__half, __half, __half, float, 1, 32, 4, 1024>": "matrix-vector product",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>": "sum of a split GEMM",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16> >": "elementwise",
    "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>": "copy",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float> >": "fill",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>, unsigned, 4, 64>": (
        "concatenation"
    ),
    "void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::BFloat16, int>": "max-pooling, torch's own",
    "void at::native::max_unpooling2d_forward_kernel<float>(long, float const*)": "max-unpooling, torch's own",
    "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>": "batch normalisation, cuDNN",
    "void cudnn::batchnorm_bwtr_nhwc_semiPersist<float, float, float, 512, 16, 3, 4>": (
        "backward of batch normalisation, cuDNN"
    ),
    "void at::native::batch_norm_collect_statistics_channels_last_kernel<at::native::Var>": (
        "batch normalisation, torch's own"
    ),
    "void at::native::batch_norm_backward_reduce_channels_last_kernel<4, c10::BFloat16>": (
        "backward of batch normalisation, torch's own"
    ),
    "triton_tem_fused_convolution_0": "Inductor's template",
    "triton_poi_fused_max_pool3d_with_indices_0": "Inductor's pointwise",
    "conv_apply_kernel": "ours: conv_apply_kernel",
    "depthwise_weight_grad_kernel": "ours: depthwise_weight_grad_kernel",
}


@pytest.mark.parametrize(("name", "words"), NAMES.items(), ids=[name[:50] for name in NAMES])
def test_kernels_are_named(name, words):
    assert label(name) == words


@pytest.mark.parametrize(
    "name",
    ["void cudnn::cnn::next_years_kernel<float>", "triton_unheard_of", "conv_kernel", "void softmax_warp_forward"],
)
def test_an_unknown_kernel_stays_visible(name):
    assert label(name) == f"{UNKNOWN}: {name}"


def test_layout_changes_and_steps_are_counted():
    conv = "sm80_xmma_dgrad_implicit_gemm_indexed_bf16bf16"
    to, back = "void cudnn::ops::nchwToNhwcKernel<float>", "void cudnn::ops::nhwcToNchwKernel<float>"
    words = "implicit GEMM dgrad, xmma sm80; 3 x NCHW to NHWC; NHWC to NCHW; unknown: mystery"
    assert algorithm([(1, conv), (1, to), (1, back), (2, to.replace("float", "__half")), (1, "mystery")]) == words
    steps = [(512, "ampere_s16816gemm_bf16_64x64_tn"), (512, "void elemWiseRNNcell<__half>")]
    assert algorithm(steps) == "512 x GEMM, tensor cores; 512 x standard RNN, cell of one step"
    assert algorithm([]) == ""


def test_kernels_are_told_apart_by_marks():
    """Of each call by itself, the one that took most first; what comes after the last mark is nobody's."""
    mark = "at::cuda::(anonymous namespace)::spin_kernel(long)"
    events = [("gemm", 5), ("relu", 9), ("gemm", 6), (mark, 1), (mark, 1), ("gemm", 2), (mark, 1), ("relu", 1)]
    assert kernels_between_marks(events) == [[(2, "gemm"), (1, "relu")], [], [(1, "gemm")]]


@pytest.mark.gpu
def test_kernels_of_several_calls():
    x = torch.randn(64, 64, device="cuda")
    found = timing.kernels_of({"product": lambda: x @ x, "two": lambda: (x.sin().sin(), x.cos())})
    assert len(found["product"]) >= 1 and not any("sin" in name for _, name in found["product"])
    assert [count for count, name in found["two"] if "sin" in name] == [2]
