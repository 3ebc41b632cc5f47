# `make demo`: a small ZAYA1 that begins to write Python after some two minutes on two CPU cores.
out_dir = 'runs/demo'
n_layer = 4
batch_size = 8          # 8 * 256 = 2,048 tokens a step
max_steps = 200         # 410,000 tokens, a sixth of the standard library
warmup_steps = 20
lr = 1e-2               # a short run can take large steps
min_lr = 1e-3
eval_every = 100
eval_batches = 10
checkpoint_every = 100
sample_tokens = 60
