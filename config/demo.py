# `make demo`: a small ZAYA1 that learns to write Python in a few minutes on two CPU cores.
out_dir = 'runs/demo'
n_layer = 4
n_embd = 256
n_expert = 8
expert_dim = 256
batch_size = 16         # 16 * 256 = 4,096 tokens a step
max_steps = 150
warmup_steps = 15
eval_every = 50
eval_batches = 10
checkpoint_every = 50
sample_tokens = 60
