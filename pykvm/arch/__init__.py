"""Knowledge of processor architectures: pure Python over registers and memory, no KVM in sight."""
