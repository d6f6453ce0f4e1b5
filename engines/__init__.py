"""Who samples: one engine a file, all with the same few methods (start, submit, poll, load).

May import: torch, transformers, vLLM, actor.py. An engine is handed a model or a folder and, later, new
weights; it knows no policy folder, no training and no game.

torch_engine.py   PyTorch, on any device, under any model whose attention transformers lets us replace
conversations.py  keys and values of many conversations, a shared prompt once: what torch_engine.py attends with
vllm_engine.py    vLLM
"""
