"""What is on the medium after a power cut? Simulated, as a killed process loses nothing.

``python -m tests.powercut --cuts N [--seed S]`` serves random requests to a block device, over a
host file whose page cache is made up: what was not synced may survive a cut, or not, or in part.
"""
