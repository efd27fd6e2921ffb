"""Calibration of caches (`flowaccel calibrate`): observe runs without a cache, fit, choose a threshold, verify."""
