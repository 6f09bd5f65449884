# Sourced by both quickstarts: how they begin, and how they judge what they trained.

# begin NAME FLAGS...: the environment, and $OUT, the folder of this quickstart, which must not exist. Of the flags of the
# training script it notes those that concern the comparison at the end.
begin() {
  local word
  OUT=${OUTPUT_DIR:-outputs/$1}
  shift
  install requirements.txt
  source "$VENV/bin/activate"
  export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
  if [ -e "$OUT" ]; then
    echo "error: $OUT already exists; remove it, or set OUTPUT_DIR to another folder" >&2
    exit 2
  fi
  STARTED=$SECONDS BASE=tiny_world/sdxl REWARD=shapes REWARD_FLAGS=() TRAINS=yes
  while [ $# -gt 0 ]; do
    word=$1
    shift
    if [[ $word == --* && $word != *=* && $# -gt 0 && $1 != --* ]]; then  # --flag value
      word=$word=$1
      shift
    fi
    case $word in
      --help | --dry_run) TRAINS= ;;
      --output_dir=*)
        echo "error: a quickstart's folder is named by OUTPUT_DIR=FOLDER before the command, not by --output_dir" >&2
        exit 2
        ;;
      --pretrained_model_name_or_path=*) BASE=${word#*=} ;;
      --reward_model=*) REWARD=${word#*=} ;;
      --reward_failure=* | --reward_dtype=* | --clip_model=* | --aesthetic_clip=* | --compositional_*=* | --mllm_*=* | \
        --base_url=* | --api_key=* | --detector*=* | --t2i_complex_*=*) REWARD_FLAGS+=("$word") ;;
    esac
  done
}

# judge: compare $OUT/run with the model that it began from; another reward than the world's is judged by both.
judge() {
  if [ -z "$TRAINS" ]; then
    rm -rf "$OUT"  # the data for a run that was only planned
    return
  fi
  [ "$REWARD" = shapes ] || REWARD_FLAGS+=(--metrics shapes)
  python scripts/evaluate.py --models base="$BASE" trained="$OUT/run" --prompts "$OUT/held_out_prompts.txt" \
    --reward_model "$REWARD" "${REWARD_FLAGS[@]}" --num_images 400 --guidance_scale 1 --batch_size 50 \
    --output_dir "$OUT/evaluation"
  echo "reward curve, against steps and forwards: $OUT/run/reward_curve.png"
  echo "images, to look at in a browser: $OUT/evaluation/report.html"
  echo "all curves: python scripts/dashboard.py $OUT/run"
  echo "time: $((SECONDS - STARTED)) s after installation"
}
