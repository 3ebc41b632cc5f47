# A run at four times the context of one that is done: `python train.py config/longer.py` after config/small.py.
# Conversations come along, with more of their reasoning, once they are prepared again for it:
#   python -m data.chat.prepare FILE.jsonl --out=data/chat_longer --context=1024 --tokenizer_from=data/chat
#   python train.py config/longer.py --init_from=runs/chat --dataset='data/stdlib:0.3 data/chat_longer:0.7'
init_from = 'runs/small'
out_dir = 'runs/longer'
context = 1024
rope_base = 100_000    # the further a position, the slower the angles: the report goes from 10K to 1M as 4K becomes 32K
batch_size = 4          # 4 * 1024 tokens, as many a step as before
max_steps = 200
warmup_steps = 20
lr = 2e-3               # the weights are good already
min_lr = 2e-4
eval_batches = 5
