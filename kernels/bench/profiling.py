"""Where a repeated piece of work spends its time: kernels by time on the device, operators by time on a CPU."""

from collections.abc import Callable

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROWS = 30


def where_time_goes(step: Callable[[], object], steps: int, device: torch.device) -> str:
    """A table of `steps` calls of `step`: milliseconds and launches of each kernel in one call."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    events = found.key_averages()
    if not on_gpu:
        return events.table(sort_by="self_cpu_time_total", row_limit=ROWS, max_name_column_width=80)
    # An annotation of the optimizer spans kernels that are listed themselves.
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    kernels = [event for event in kernels if not event.key.startswith("Optimizer.step")]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    lines = [
        f"{'ms a step':>12}{'share':>8}{'calls':>7}  kernel",
        f"{total / 1e3 / steps:>12.3f}  all",
    ]
    lines += [
        f"{event.self_device_time_total / 1e3 / steps:>12.3f}"
        f"{event.self_device_time_total / total:>8.1%}{event.count // steps:>7}  {event.key[:120]}"
        for event in kernels[:ROWS]
    ]
    return "\n".join(lines)
