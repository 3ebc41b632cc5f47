"""The exercises, in reading order. Each is one function of the project, to be written anew.

    name        what the command line calls it
    function    where it is: module, then class and function
    task        what the body must do; goes into the student's file as a comment
    hint        how one may begin
    tests       those of tests/ that decide, 'file: test test ...'; what their names say must be true

[CCA] is arXiv 2510.04476, [Z8] the ZAYA1-8B report, arXiv 2605.05365.
"""
from typing import NamedTuple


class Exercise(NamedTuple):
    name: str
    function: str
    task: str
    hint: str
    tests: str


EXERCISES = [
    Exercise('rmsnorm', 'layers.RMSNorm.forward', """
        x (..., E) -> (..., E):  x / sqrt(mean of x^2 over the last dim + eps) * w,  with w = self.weight.
        Compute in float32, whatever x is (`upcast`); return the weight's dtype. [Z8] IV-D.""",
             'torch.rsqrt is 1 / sqrt; keepdim=True lets the mean divide what it is the mean of.',
             'test_model: test_rms_norm_has_unit_rms_and_forgets_the_scale test_rms_norm_is_torch_s_own '
             'test_the_numbers_of_section_iv_d_are_float32_under_bf16'),
    Exercise('residual', 'layers.ResidualScaling.forward', """
        x (..., E) float32, f (..., E) -> (..., E) float32:  (x + b_r) a_r + (f + b_f) a_f.  [Z8] eq. 6.
        f may be bfloat16: widen it, or the sum is rounded.""",
             'The equation is the answer, almost letter by letter; __init__ says which parameter is which letter.',
             'test_model: test_residual_scaling_is_equation_6 test_residual_scaling_at_init_is_the_plain_residual '
             'test_the_numbers_of_section_iv_d_are_float32_under_bf16'),
    Exercise('cache', 'cache.Cache.update', """
        Keep of this layer what the next tokens need, and return all keys and values so far, (B, Hk, P, d) each.
        qk[layer], v_last[layer]: row b's last two columns of qk and last one of v_delayed that are real. They begin
            with the past, so that these are at self.newest[b]; self.newest is None if no column is padding.
        k[layer], v[layer]: column s of row b goes to place self.target[b, s], which for padding is the last place.
        Return the first self.P places, in k's dtype; if self.P is None nothing was held, and k and v are all.""",
             'store[self.rows, :, self.target] addresses (B, S) places at once, and is (B, S, Hk, d).',
             'test_cca: test_cached_forward_equals_the_full_forward_for_any_split '
             'test_rows_of_different_lengths_get_what_they_get_alone '
             'test_padding_leaves_no_trace_even_if_it_is_not_a_number'),
    Exercise('convolution', 'cca.merge_convolutions', """
        One convolution of kernel 3 that equals the two of kernel 2, by the equations above. [CCA] II-B.
        Weights (H, d, 3d): for each head a matrix, out x in, for each of three taps, from old to new, side by side.
        Bias (H, d). All in float32 (`upcast`).""",
             'View w1 as (H, 1, d, 2) and w2 as (H, d, d, 2): a depthwise factor then scales a column of a matrix.',
             'test_cca: test_the_merged_convolution_equals_the_two '
             'test_mix_equals_the_steps_one_by_one_with_its_gradients'),
    Exercise('qk_mean', 'cca.qk_mean', """
        m_q = (q~ + k~ of the head's KV group) / 2, (Hq, ...);  m_k = mean of m_q over the group's G heads, (Hk, ...).
        Query head h belongs to KV head h // G. [CCA] II-B.""",
             'unflatten the heads of q into (Hk, G): then k needs one more dim, and the mean is over dim 1.',
             'test_cca: test_qk_mean_is_the_paper_s_head_by_head '
             'test_mix_equals_the_steps_one_by_one_with_its_gradients'),
    Exercise('norm', 'cca.norm', """
        x (H, B, S, d), size (H) -> size x / |x|, each vector of d numbers by itself. [CCA] II-B: q <- sqrt(d) q / |q|,
        k <- T sqrt(d) k / |k|; the caller puts sqrt(d) and T sqrt(d) into size. A zero vector must stay zero, with
        gradients that are numbers.""",
             'Clamp the length from below by a tiny number before you divide.',
             'test_cca: test_norm_gives_each_head_its_length_and_keeps_its_direction test_norm_of_zero_is_zero '
             'test_queries_have_length_sqrt_d_and_keys_t_sqrt_d test_mix_of_zeros_is_zero_with_finite_gradients'),
    Exercise('rope', 'cca.rope', """
        Dims i and i + n, for i < n, are a point in the plane: turn it by the angle whose cos and sin are given,
            (a, b) -> (a cos - b sin, b cos + a sin),
        and leave dims from 2n on as they are. x (H, B, S, d), cos and sin (B or 1, S, n) -> (H, B, S, d).""",
             'Slice x into three along the last dim, turn two of them, and put all three side by side again.',
             'test_cca: test_rope_turns_dims_i_and_i_plus_n_by_the_angle '
             'test_rope_keeps_norms_and_the_unrotated_dims test_rope_depends_on_distance_only'),
    Exercise('attention', 'cca.CCA.forward', """
        The seven steps at the top of this file; self.mix is steps 2 to 5. [CCA] II-B.
        1  W_Q x and W_K x side by side are qk (B, S, C); v is W_V1 x, v_delayed is W_V2 x, (B, S, Hk d / 2) each.
        6  Put what came before in front of v_delayed: zeros, or cache.v_last[layer]. Values are v at t beside
           v_delayed at t - 1, which is 0 where a document starts; cut into Hk heads.
        7  With a cache, cache.update(layer, [past; qk], [before; v_delayed], k, v) gives all keys and values; past is
           cache.qk[layer], which mix wants, too. Attend causally, or by the mask; then W_O.""",
             'F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True).',
             'test_cca: test_with_two_kv_heads_one_value_head_sees_this_token_and_one_the_token_before '
             'test_cca_is_causal test_cached_forward_equals_the_full_forward_for_any_split '
             'test_a_packed_window_has_the_loss_and_gradients_of_its_documents_alone'),
    Exercise('router', 'router.Router.forward', """
        r = W_down x + b_down + gamma r_below (gamma: self.eda_scale, None in layer 0);  s = softmax(MLP(RMSNorm(r))),
        in float32;  expert and weight are self.choose(s, self.balancing_bias). [Z8] II-A2, eqs. 1-5. The layer above
        gets r as it is, not normed. In training only, add to self.load (M) how many tokens each class got.""",
             'The MLP is fc1, GELU, fc2, GELU, out_proj; F.one_hot(expert.flatten(), M).sum(0) counts.',
             'test_router: test_depth_averaging_adds_the_layer_below_scaled test_layer_0_has_no_depth_averaging '
             'test_probabilities_sum_to_one_and_the_weight_is_the_chosen_one_s test_no_gradient_reaches_the_bias '
             'test_loads_count_each_token_once_and_in_training_only'),
    Exercise('balancer', 'router.Balancer.step', """
        Move b by the load of the step that is over. [Z8] II-A2: error = fractions - 1 / N, (layers, N), and 0 for a
        layer that saw no token. 'pid': the error is the gradient of each self.biases, and self.adamw steps; 'sign':
        b -= lr sign(error); 'none', or update=False: no move. In any case clear the loads (without 'skip', the last
        class, they are router.load[:n_expert]; with torch.distributed, dist.all_reduce sums them first).""",
             'Who got too much has a positive error, and must lose: that is a step against a gradient.',
             'test_router: test_pid_is_adamw_on_the_error_and_sign_a_fixed_step_against_it '
             'test_the_balancer_moves_the_models_own_biases_and_leaves_skip_alone '
             'test_a_skipped_step_clears_the_loads_and_moves_nothing test_a_step_without_tokens_moves_nothing'),
    Exercise('experts', 'model.Experts.forward', """
        x (T, E), expert (T), weight (T) -> (T, E): weight * W_down swiglu(W_gate_up x), by each token's own expert;
        zero for expert N, 'skip'. Sort the tokens by expert, multiply slice by slice, put the order back.
        grouped_mm(x, W.mT, offs=ends) multiplies rows ends[e - 1] : ends[e] by W[e]; rows after the last end are not
        defined, gradients neither. (Slices filled up with zeros, and other dtypes, are for speed: do without.)""",
             'order = expert.sort(stable=True).indices; what is sorted by order is put back by order.argsort().',
             'test_model: test_dispatch_equals_the_dense_one_hot_formula '
             'test_gradients_of_dispatch_are_those_of_each_expert_alone '
             'test_skipped_tokens_get_zero_and_finite_gradients_from_undefined_rows'),
    Exercise('sample', 'sample.sample_from_logits', """
        Draw by inverse CDF. Of softmax(logits / temperature), sorted from likely to unlikely, keep a token if less than
        top_p lies before it, if it has at least min_p times the largest, and if it is one of top_k (0: all); the
        likeliest always stays. Then the first kept token at which the sum of those kept exceeds u times their total.
        temperature 0: the likeliest. A row with NaN or infinity: -1. A tiny temperature must not overflow.""",
             'torch.searchsorted(cdf, values, right=True) is the first place where cdf > value.',
             'test_sample: test_temperature_zero_takes_the_likeliest '
             'test_shares_of_u_are_the_renormalised_probabilities '
             'test_an_excluded_token_is_never_drawn test_a_u_between_two_tokens_belongs_to_the_second '
             'test_the_largest_u_gives_a_kept_token test_the_smallest_temperatures_take_the_likeliest '
             'test_logits_that_are_not_finite_draw_nothing test_rows_are_drawn_independently'),
    Exercise('orthogonalize', 'optim.orthogonalize', """
        G (..., m, n) -> the same singular vectors, singular values near 1, each matrix of a stack by itself:
        X = G / |G| (Frobenius), then `rounds` times  X <- A X + B (X X^T) X + C (X X^T)^2 X.
        Turn a tall matrix on its side first, and back at the end: X X^T is then the smaller product.""",
             'X.norm(dim=(-2, -1), keepdim=True) is one norm a matrix; clamp it, for a gradient may be zero.',
             'test_optim: test_the_update_has_singular_values_near_1 test_the_update_keeps_the_singular_vectors '
             'test_each_expert_of_a_stack_is_a_matrix_of_its_own'),
    Exercise('muon', 'optim.Muon.step', """
        For each p of each of self.param_groups, with m = self.state[p]['momentum'], zero at first:
            m <- momentum m + (1 - momentum) grad;   u = momentum m + (1 - momentum) grad    (Nesterov)
            p <- (1 - lr weight_decay) p - lr 0.2 sqrt(max(rows, columns)) orthogonalize(u)
        [Z8] IV-A; arXiv 2502.16982 for the scale. p is a matrix, or a stack of them. One by one is right; several of
        one shape together are faster.""",
             'a.lerp_(b, w) is a <- (1 - w) a + w b, in place: both averages are one lerp each.',
             'test_optim: test_muon_equals_torch_s_own_for_each_of_many_matrices test_an_update_has_adamw_s_rms'),
    Exercise('trim', 'data.reasoning.ap_trim', """
        The first of these rules that gives a sample of at most `budget` tokens, and its name. [Z8] III.
            'kept'              the sample as it is
            'cut'               only the last turn's reasoning cut at its end: cut_last
            'earlier dropped'   the earlier turns without reasoning, the last one's cut as before
            'dropped'           (None, 'dropped'): questions and answers alone are too long""",
             'cut_last says None if even no reasoning in the last turn does not do; turn._replace(think=[]) is a turn '
             'without.',
             'test_reasoning: test_fitting_sample_is_untouched test_ap_trimming_is_the_four_rules_tried_in_turn '
             'test_every_question_and_answer_survives_whole'),
    Exercise('rsa', 'rsa.rounds_of', """
        Rounds 0 to T, each yielded. [Z8] VI. First check the settings, with check_ranges.
        A round: who reads whom (round 0: nobody; C = 1: each its own tail; else C of N by rng.sample, a question's rng
        being random.Random(f'{seed} {list(question)}')). Prompts by build_prompt. ONE call of generate for all
        questions, with `budget`, or final_budget in round T. Of each output its answer and its tail: the last `tail`
        tokens of thought_of(output), or of the answer if compact is 'answer' and there is one. If C = 1, who has an
        answer has the prompt None, and keeps output, answer and tail.
        Rounds in `done` are over: their draws are made (and thrown away), and nothing else.""",
             'Two loops: rounds outside, questions inside. Draw for all questions before you look at `done`.',
             'test_rsa: test_without_rounds_it_is_parallel_sampling test_one_candidate_carries_its_own_tail '
             'test_draws_are_without_replacement_and_from_the_population test_the_record_is_what_happened '
             'test_seeds_reproduce_draws_and_questions_have_their_own test_more_rounds_begin_with_the_same_rounds '
             'test_compact_answer_passes_on_the_answer_of_the_finished_and_the_tail_of_others '
             'test_a_chain_that_ended_without_an_answer_gets_another_try '
             'test_what_makes_no_sense_is_refused_in_one_line'),
    Exercise('vote', 'tasks.problems.majority_vote', """
        The most frequent answer, of several the first to appear; equal(a, b) says whether two are the same. None is no
        vote; if nobody votes, the result is None.""",
             'max(..., key=...) returns the first of the largest.',
             'test_rsa: test_majority_is_the_first_of_the_most_frequent test_majority_by_example'),
]
