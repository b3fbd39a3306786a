"""Helpers for tests: processes that run MindSpore for real, on the CPU or over the emulated CANN."""
