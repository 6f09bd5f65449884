#!/usr/bin/env bash
# RLHF Diffusion-Sharpening of the tiny SDXL from prompts alone: environment, training, comparison. No download but packages.
# Flags given here go to the training script, come last and win.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
source scripts/quickstart_common.sh
begin quickstart_rlhf "$@"

python tiny_world/make_shapes_dataset.py --training_prompts "$OUT/prompts.txt" --held_out_prompts "$OUT/held_out_prompts.txt"

accelerate launch --quiet --num_processes 1 --num_machines 1 --num_cpu_threads_per_process 2 \
  --mixed_precision no --dynamo_backend no \
  train_rlhf_diffusion_sharpening_sdxl.py \
  --pretrained_model_name_or_path=tiny_world/sdxl \
  --prompts_file="$OUT/prompts.txt" --cache_dir="$OUT/cache" \
  --resolution=32 --reward_model=shapes \
  --preset=efficient --infer_steps=5 --guidance_scale=1 --beta_dpo=200 \
  --train_batch_size=24 --max_train_steps=150 --seed=0 \
  --learning_rate=1e-4 --lr_scheduler=cosine --lr_warmup_steps=15 \
  --adam_weight_decay=0 --use_ema --ema_decay=0.95 \
  --generation_batch_size=96 --score_batch_size=96 --decode_batch_size=96 --train_rows=48 \
  --validation_prompts_file="$OUT/held_out_prompts.txt" --num_validation_images=16 --validation_guidance_scale=1 \
  --validation_steps=30 --validation_epochs=0 \
  --checkpointing_steps=150 --report_to=tensorboard \
  --output_dir="$OUT/run" "$@"

judge
