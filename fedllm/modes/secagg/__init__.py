"""Secure sums - SecAgg and SecAgg+: the server learns the weighted sum of a cohort's vectors and no single vector.

Start with :mod:`~fedllm.modes.secagg.client` (the messages and one client's five answers), then
:mod:`~fedllm.modes.secagg.server`. Below them lie :mod:`~fedllm.modes.secagg.ring` (numbers and masks),
:mod:`~fedllm.modes.secagg.graph` (who shares with whom, and the threshold), :mod:`~fedllm.modes.secagg.keys` and
:mod:`~fedllm.modes.secagg.field`. Nothing here does input or output, or knows an engine.
"""
