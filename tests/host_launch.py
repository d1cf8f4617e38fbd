"""Launches as on a GPU, with a driver whose launch does nothing: run by test_bench.py in a process of its own, since
Triton must not interpret here."""

import torch
from backstride.bench import host
from backstride.kernels.conv import epilogue
from backstride.kernels.runtime import layout_of
from triton import knobs


def record_launches(monitored):
    """The stub's launcher, which also notes what it was given and what the kernel was compiled for."""

    def launcher(source, metadata):
        def launch(*arguments):
            arguments = arguments[:6] + arguments[9:]  # between them is what profilers are told
            described = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in arguments]
            monitored.append((str(source.attrs), metadata.name, [a for a in described if not callable(a)]))

        return launch

    return staticmethod(launcher)


def check_second_launch_is_the_first():
    """A kept launch hands over what Triton's own look-up handed over."""
    launches = []
    host._Driver.launcher_cls = record_launches(launches)
    with host.stubbed_launch(), torch.no_grad():
        for op, (ours, _) in host.calls("cpu").items():
            launches.clear()
            ours()
            first = list(launches)
            launches.clear()
            ours()
            assert first and launches == first, op


def check_alignment_is_looked_at():
    """A tensor that starts between two 16-byte lines can't take a kernel that loads whole ones."""
    launches = []
    host._Driver.launcher_cls = record_launches(launches)
    whole = torch.randn(1 * 8 * 8 * 8 + 1)
    weight = torch.randn(8, 8, 3, 3)
    with host.stubbed_launch(), torch.no_grad():
        for offset in (0, 1, 0, 1):
            host.fused_ops.conv2d(whole[offset : offset + 512].view(1, 8, 8, 8), weight)
    compiled_for = [attributes for attributes, *_ in launches]
    assert compiled_for[0] == compiled_for[2] and compiled_for[1] == compiled_for[3]
    assert compiled_for[0] != compiled_for[1]


class OnGPU:
    """What a launch asks a tensor on a GPU about itself."""

    def __init__(self, tensor):
        self.tensor, self.dtype = tensor, tensor.dtype

    def get_device(self):
        return 0

    def data_ptr(self):
        return self.tensor.data_ptr()


def check_addresses_are_handed_over():
    """Of tensors on a GPU, from the second launch on; but what watches launches is told as Triton would tell it."""
    launches, told = [], []
    host._Driver.launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: launches.append(arguments))
    y, bias = torch.zeros(1, 16, 8, 8).to(memory_format=torch.channels_last), torch.zeros(16)
    plan = epilogue.plan_epilogue(layout_of(y), y.dtype)

    def launch():
        plan.launch(OnGPU(y), OnGPU(bias), None, HAS_BIAS=True, HAS_RESIDUAL=False, RELU=True)
        *_, about, before, after = launches[-1][:9]
        return launches[-1][9:], about, before, after

    with host.stubbed_launch():
        tensors, about, before, after = launch()
        assert isinstance(tensors[0], OnGPU) and about is not None and callable(before) and callable(after)
        addresses, *watched = launch()
        assert addresses[:3] == (y.data_ptr(), bias.data_ptr(), None) and watched == [None] * 3
        assert addresses[3:] == tensors[3:]
        knobs.runtime.launch_enter_hook.add(told.append)
        try:
            again, about, before, after = launch()
        finally:
            knobs.runtime.launch_enter_hook.remove(told.append)
        assert again == addresses and about is not None and callable(before) and callable(after)


if __name__ == "__main__":
    check_addresses_are_handed_over()
    check_second_launch_is_the_first()
    check_alignment_is_looked_at()
    rows = host.measure(rounds=2, repeats=5)
    assert {row.op for row in rows} == set(host.calls("cpu")) and all(row.ours_us > 0 for row in rows)
