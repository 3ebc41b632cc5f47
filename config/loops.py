# The loops task (tasks/loops/) for Markovian RSA, with 1.1M parameters. First `python -m tasks.loops.prepare`.
out_dir = 'runs/loops'
dataset = 'tasks/loops/traces:0.5 tasks/loops/votes:0.5'
n_layer = 4
n_embd = 128
n_head = 4              # two KV heads: one has the value of this token, the other that of the previous token
n_kv_head = 2
head_dim = 32
n_expert = 4
expert_dim = 128
router_dim = 32
batch_size = 8          # 8 * 256 = 2,048 tokens per step: arithmetic, learned last, needs steps more than tokens
max_steps = 1000        # 2.0M tokens
warmup_steps = 20
lr = 1e-2
min_lr = 5e-4
balancer_lr = 3e-3      # slower, so that tokens change experts less often
eval_every = 500
eval_batches = 10
checkpoint_every = 500
sample_tokens = 0
