"""The passes, in the order they run.

capture -> propagate -> calibrate -> reorder -> accept -> fold -> lower
"""
