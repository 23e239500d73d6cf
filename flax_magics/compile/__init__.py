"""From a call that is traced to a program that is kept: trace, lowering, XLA, disk, and why a program is new."""
