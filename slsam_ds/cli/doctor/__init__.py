"""`slsam doctor`: whether this machine will train with SL-SAM, and with this DeepSpeed configuration and model."""
