# `make demo`: the loops task with two layers (config/loops.py: four). First `python -m tasks.loops.prepare`.
out_dir = 'runs/demo_loops'
dataset = 'tasks/loops/traces:0.5 tasks/loops/votes:0.5'
n_layer = 2             # half the time of four layers per step; arithmetic is learned in 240 steps, not 300
n_embd = 128
n_head = 4
n_kv_head = 2
head_dim = 32
n_expert = 4
expert_dim = 128
router_dim = 32
batch_size = 8          # 8 * 256 = 2,048 tokens per step
max_steps = 1200        # 2.5M tokens; in the last 900 steps only aggregation still improves
warmup_steps = 20
lr = 2e-2
min_lr = 0.0
decay_fraction = 0.7
balancer_lr = 3e-3
eval_every = 200        # with a solution of a held-out problem
eval_batches = 5
checkpoint_every = 400
sample_tokens = 48
