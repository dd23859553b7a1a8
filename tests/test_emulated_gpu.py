"""The emulated GPU (emulated_gpu.py) behaves like a real one wherever programs depend on it; skipped on a real GPU."""

import emulated_gpu
import numpy as np
import pytest
import torch

from opt_fast import attention_cpp, nvrtc

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not emulated_gpu.KEPT, reason="no GPU is emulated here")]


def test_fresh_memory_holds_nothing_of_use():
    assert torch.empty(3, device="cuda").isnan().all()
    assert torch.empty_like(torch.zeros(2, 3, device="cuda").T).isnan().all()
    assert (torch.empty(2, dtype=torch.int32, device="cuda") == -1).all()


def test_views_and_results_are_where_they_would_be():
    x = torch.zeros(4, 6, dtype=torch.float64, device="cuda")
    y = x[1:, ::2].T
    y += 1
    assert (x.sum().item(), y.is_cuda, y.data_ptr() - x.data_ptr()) == (9, True, 6 * 8)
    torch.add(x, 1, out=x)
    made = torch.add(x, 0.1, out=torch.empty(0, dtype=torch.float64, device="cuda"))
    assert made.tolist() == (x.cpu() + 0.1).tolist()
    assert (torch.arange(3, device="cuda") * 0.5).dtype == torch.float32


def test_a_copy_that_nobody_waited_for_is_not_there():
    x, there, early, late = torch.ones(3, device="cuda"), torch.zeros(3), torch.cuda.Event(), torch.cuda.Event()
    early.record()
    there.copy_(x, non_blocking=True)
    x += 1
    late.record()
    early.synchronize()
    assert there.isnan().all()
    late.synchronize()
    assert there.tolist() == [1, 1, 1]
    there.copy_(x, non_blocking=True)
    assert x[0].item() == 2  # which waits for all before
    assert there.tolist() == [2, 2, 2]
    with pytest.raises(AssertionError, match="nobody has recorded"):
        torch.cuda.Event().synchronize()


def test_what_is_captured_happens_when_it_is_replayed():
    x, graph = torch.zeros(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        x += 1
        y = torch.stack([x * 2, x.expand(3)])
        x[1:2] = 7
    assert x.tolist() == [0, 0, 0]
    graph.replay()
    assert (x.tolist(), y.tolist()) == ([1, 7, 1], [[2, 2, 2], [1, 1, 1]])
    graph.replay()
    assert (x.tolist(), y.tolist()) == ([2, 7, 2], [[4, 16, 4], [2, 8, 2]])


@pytest.mark.parametrize("what", [lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: x.copy_(torch.ones(3)), lambda x: x.nonzero()])
def test_the_host_does_not_wait_while_a_graph_is_captured(what):
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        what(x)
    assert x.tolist() == [1, 1, 1]


def start(grid=(1, 1, 1), block=128, shared=0, stream=0, **more):
    """A kernel with arguments that it does not read."""
    found = nvrtc.kernel(0, "flash_decode_mma.cu", "flash_combine", 1000, DH=64, BF16=0)
    nvrtc.launch(found, 0, stream, grid, block, shared, 0, 0, 0, 0, np.int32(0), np.int64(0), np.int32(0), np.int32(0), **more)


REFUSED = ({"grid": (1, 65536, 1)}, {"block": 2048}, {"shared": 60_000}, {"grid": (4000, 1, 1), "cooperative": True}, {"stream": 4096})


@pytest.mark.parametrize("wrong", REFUSED)
def test_a_launch_that_a_gpu_would_refuse(wrong, capfd):
    with pytest.raises(Exception, match=r"not within an acceptable range|exceeds the limit|too large|executing a kernel"):
        start(**wrong)
    assert ("another stream than torch's current one" in capfd.readouterr().err) == ("stream" in wrong)


def test_more_shared_memory_than_there_is():
    with pytest.raises(RuntimeError, match="needs 300000 bytes of shared memory a block"):
        nvrtc.kernel(0, "flash_decode_mma.cu", "flash_combine", 300_000, DH=64, BF16=0)


def test_a_kernels_mistake_is_an_error_that_names_the_place(capfd):
    q, k, v = (torch.randn(1, 8, 1, 64, device="cuda").half() for _ in range(3))
    assert attention_cpp.mma(q, k, v, 0.125)[0].isfinite().all()
    kernel = attention_cpp.Mma(64)
    O, L = attention_cpp.results(q)
    given = kernel.arguments(q, k, v, O[:, :, :, :0], L, 0.125, None)
    given[0] += 2**40  # where nothing lies
    with pytest.raises(Exception, match="executing a kernel"):
        attention_cpp.run(kernel, q, "flash_fwd_mma.cu", "flash_fwd_mma", (1, 1, 1), given)
    assert "flash_fwd_mma" in capfd.readouterr().err
    assert attention_cpp.mma(q, k, v, 0.125)[0].isfinite().all()  # and the next is none
