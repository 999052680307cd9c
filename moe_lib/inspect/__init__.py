"""Watch any mixture of experts, and see whether it has collapsed.

    from moe_lib.inspect import inspect_moe, watch
    panel = inspect_moe(model, loader)
    with watch(model, every=100) as w: ...

Needs torch and numpy; pictures need matplotlib, tables pandas: `pip install moe-collapse[inspect]`.
"""

from moe_lib.inspect.adapters import Adapter, Call, Dispatch, rows
from moe_lib.inspect.alarms import THRESHOLDS, Alarm, early_warning
from moe_lib.inspect.measures import ABOUT, Layer
from moe_lib.inspect.panel import Comparison, Panel
from moe_lib.inspect.run import inspect_moe
from moe_lib.inspect.watching import CollapseCallback, Watch, watch

__all__ = [
    "ABOUT", "THRESHOLDS", "Adapter", "Alarm", "Call", "CollapseCallback", "Comparison", "Dispatch", "Layer",
    "Panel", "Watch", "early_warning", "inspect_moe", "rows", "watch",
]  # fmt: skip
