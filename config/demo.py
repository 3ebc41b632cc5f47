# `make demo`: a small ZAYA1 that writes Python-like text after about two minutes of training on two CPU cores.
out_dir = 'runs/demo'
n_layer = 4
batch_size = 8          # 8 * 256 = 2,048 tokens per step
max_steps = 200         # 410,000 tokens, 0.17 epochs of the standard library
warmup_steps = 20
lr = 1e-2               # higher than in config/small.py, for a short run
min_lr = 1e-3
eval_every = 100
eval_batches = 10
checkpoint_every = 100
sample_tokens = 60
