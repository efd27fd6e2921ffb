"""What `flowaccel calibrate` does to a cache: observe untouched runs, fit, choose, verify."""
