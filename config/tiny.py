# For quick trials and tests: a few seconds on any machine.
out_dir = 'runs/tiny'
n_layer = 2
n_embd = 64
n_head = 4
n_kv_head = 1
head_dim = 16
n_expert = 4
expert_dim = 64
router_dim = 16
context = 64
batch_size = 8
max_steps = 50
eval_every = 25
eval_batches = 2
checkpoint_every = 25
log_every = 5
sample_tokens = 20
