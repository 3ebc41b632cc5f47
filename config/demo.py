# `make demo`: a small ZAYA1 that begins to write Python after some three minutes on two CPU cores.
out_dir = 'runs/demo'
n_layer = 4
batch_size = 8          # 8 * 256 = 2,048 tokens a step
max_steps = 250         # 512,000 tokens, a fifth of the standard library
warmup_steps = 25
lr = 1e-2               # a short run can take large steps
min_lr = 1e-3
eval_every = 125
eval_batches = 20
checkpoint_every = 125
sample_tokens = 60
