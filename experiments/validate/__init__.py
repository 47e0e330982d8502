"""Replays compared with live runs, and testbeds calibrated."""
