"""What the lesson needs and does not teach: set-up, files, processes, logs.

May import: everything of ours. Nothing of the method (losses, advantages, labels) is defined here.

policies.py        the tiny policy; loading, saving, LoRA, half precision of any
processes.py       several processes: shares of the work, sums over them, weights spread over them (FSDP)
checkpoints.py     checkpoints that appear complete or not at all; resuming
logs.py curves.py  what a run logs; curves.png from it
demonstrations.py  what experts do as training data, or as a chat dataset
toy_figures.py     the four figures of toy_bandit.py
bench.py           speeds as ratios: python -m support.bench
"""
