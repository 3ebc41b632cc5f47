# Reinforcement learning from runs/loops (rl.py). First `python train.py config/loops.py`.
out_dir = 'runs/rl'
init_from = 'runs/loops'
