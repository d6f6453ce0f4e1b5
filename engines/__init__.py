"""Who samples: one engine a file, all with the same few methods (start, submit, poll, load).

May import: torch, transformers, vLLM, actor.py. An engine is handed a model or a folder and, later, new
weights; it knows no policy folder, no training and no game.

torch_engine.py   PyTorch, on any device, with a key-value cache that lives on from turn to turn
vllm_engine.py    vLLM
"""
