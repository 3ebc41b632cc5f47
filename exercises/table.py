"""The exercises, in reading order. Each is one function of the project to implement.

    name        its name on the command line
    function    its module, class and function
    task        what the body must do; a comment in the student's file
    hint        a first step
    tests       the tests of tests/ that must pass, 'file: test test ...'

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
        Compute in float32, whatever the dtype of x (`upcast`); return the weight's dtype. [Z8] IV-D.""",
             'torch.rsqrt is 1 / sqrt; with keepdim=True, the mean broadcasts over the last dim.',
             'test_model: test_rms_norm_has_unit_rms_and_forgets_the_scale test_rms_norm_is_torch_s_own '
             'test_the_numbers_of_section_iv_d_are_float32_under_bf16'),
    Exercise('residual', 'layers.ResidualScaling.forward', """
        x (..., E) float32, f (..., E) -> (..., E) float32:  (x + b_r) a_r + (f + b_f) a_f.  [Z8] eq. 6.
        f may be bfloat16: upcast it, so that the sum is not rounded.""",
             'The equation is almost the code; the comments of __init__ name the symbol of each parameter.',
             'test_model: test_residual_scaling_is_equation_6 test_residual_scaling_at_init_is_the_plain_residual '
             'test_the_numbers_of_section_iv_d_are_float32_under_bf16'),
    Exercise('cache', 'cache.Cache.update', """
        Store the state and the new keys and values of this layer; return the keys and values to attend to.
        self.qk[layer], self.v_last[layer]: the last two real tokens of qk, the last real one of v2. Both start
            with the state, so these are at self.newest[b] in sequence b; self.newest is None without padding.
        self.k[layer], self.v[layer]: token s of sequence b goes to position self.target[b, s], padding to the last.
        Return the first self.P positions, in k's dtype; if self.P is None, the cache was empty: return k and v.""",
             'store[self.rows, :, self.target] indexes (B, S) positions at once, and has the shape (B, S, Hk, d).',
             'test_cca: test_cached_forward_equals_the_full_forward_for_any_split '
             'test_rows_of_different_lengths_get_what_they_get_alone '
             'test_padding_leaves_no_trace_even_if_it_is_not_a_number'),
    Exercise('convolution', 'cca.merge_convolutions', """
        The convolution with kernel 3 that equals the two with kernel 2, by the equations above. [CCA] II-B.
        Weight (H, d, 3d): per head, the matrices (out x in) of the three taps, concatenated from oldest to newest.
        Bias (H, d). All in float32 (`upcast`).""",
             'View w1 as (H, 1, d, 2) and w2 as (H, d, d, 2): a depthwise factor then scales a matrix column.',
             'test_cca: test_the_merged_convolution_equals_the_two '
             'test_mix_equals_the_steps_one_by_one_with_its_gradients'),
    Exercise('qk_mean', 'cca.qk_mean', """
        m_q = (q~ + k~ of the head's KV group) / 2, (Hq, ...);  m_k = mean of m_q over the group's G heads, (Hk, ...).
        Query head h belongs to KV head h // G. [CCA] II-B.""",
             'Unflatten the heads of q into (Hk, G): then k needs one more dim, and the mean is over dim 1.',
             'test_cca: test_qk_mean_is_the_paper_s_head_by_head '
             'test_mix_equals_the_steps_one_by_one_with_its_gradients'),
    Exercise('norm', 'cca.norm', """
        x (H, B, S, d), size (H) -> size x / |x|, where |x| is the norm over the last dim. size holds sqrt(d) for query
        heads and T sqrt(d) for key heads. [CCA] II-B. A zero vector must stay zero, with finite gradients.""",
             'Clamp the norm to a small minimum before the division.',
             'test_cca: test_norm_gives_each_head_its_length_and_keeps_its_direction test_norm_of_zero_is_zero '
             'test_queries_have_length_sqrt_d_and_keys_t_sqrt_d test_mix_of_zeros_is_zero_with_finite_gradients'),
    Exercise('rope', 'cca.rope', """
        Rotate each pair of dims i and i + n, for i < n, by the angle with the given cos and sin,
            (a, b) -> (a cos - b sin, b cos + a sin),
        and leave the dims from 2n on unchanged. x (H, B, S, d), cos and sin (B or 1, S, n) -> (H, B, S, d).""",
             'Split the last dim of x into three parts, rotate the first two, and concatenate all three.',
             'test_cca: test_rope_turns_dims_i_and_i_plus_n_by_the_angle '
             'test_rope_keeps_norms_and_the_unrotated_dims test_rope_depends_on_distance_only'),
    Exercise('attention', 'cca.CCA.forward', """
        The seven steps at the top of this file; self.mix is steps 2 to 5. [CCA] II-B.
        1  self.project(x) is qk (B, S, C), W_Q x and W_K x; then v1, W_V1 x, and v2, W_V2 x, (B, S, Hk d / 2) each.
        6  Prepend the state to v2: zeros, or cache.v_last[layer]. The values are v1 at t and v2 at t - 1
           (0 where a document starts), concatenated and split into Hk heads.
        7  With a cache, cache.update(layer, [past; qk], [state; v2], k, v) returns all keys and values; past
           is cache.qk[layer], which mix needs, too. Attend causally, or with the mask; then W_O.""",
             'F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True).',
             'test_cca: test_with_two_kv_heads_one_value_head_sees_this_token_and_one_the_token_before '
             'test_cca_is_causal test_cached_forward_equals_the_full_forward_for_any_split '
             'test_a_packed_window_has_the_loss_and_gradients_of_its_documents_alone'),
    Exercise('router', 'router.Router.forward', """
        r = W_down x + b_down + gamma r_below (gamma: self.eda_scale, None in layer 0);  s = softmax(MLP(RMSNorm(r))),
        in float32;  expert and weight are self.choose(s, self.balancing_bias). [Z8] II-A2, eqs. 1-5. The returned r
        is not normed. In training only, add the number of tokens of each class to self.load (M).""",
             'The MLP is fc1, GELU, fc2, GELU, out_proj; F.one_hot(expert.flatten(), M).sum(0) counts.',
             'test_router: test_depth_averaging_adds_the_layer_below_scaled test_layer_0_has_no_depth_averaging '
             'test_probabilities_sum_to_one_and_the_weight_is_the_chosen_one_s test_no_gradient_reaches_the_bias '
             'test_loads_count_each_token_once_and_in_training_only'),
    Exercise('balancer', 'router.Balancer.step', """
        Update the biases from the expert load. [Z8] II-A2: error = fractions - 1 / N, (layers, N), and 0 for a layer
        without tokens. 'pid': use the error as the gradient of self.biases, and step self.adamw; 'sign':
        b -= lr sign(error); 'none', or update=False: no update. In any case clear the loads and return the fractions.
        The loads are router.load[:n_expert], without 'skip'; with torch.distributed, dist.all_reduce sums them.""",
             'An overloaded expert has a positive error, and its bias must decrease: a step against the gradient.',
             'test_router: test_pid_is_adamw_on_the_error_and_sign_a_fixed_step_against_it '
             'test_the_balancer_moves_the_models_own_biases_and_leaves_skip_alone '
             'test_a_skipped_step_clears_the_loads_and_moves_nothing test_a_step_without_tokens_moves_nothing'),
    Exercise('experts', 'model.Experts.forward', """
        x (T, E), expert (T), weight (T) -> (T, E): weight * W_down swiglu(W_gate_up x), by each token's own expert;
        zero for expert N, 'skip'. Sort the tokens by expert, multiply each slice, restore the order.
        grouped_mm(x, W.mT, offs=ends) multiplies x[ends[e - 1]:ends[e]] by W[e]; results and gradients after the last
        end are undefined. Padded slices and other dtypes are optimizations, which you can omit.""",
             'order = expert.sort(stable=True).indices sorts the tokens; order.argsort() restores their order.',
             'test_model: test_dispatch_equals_the_dense_one_hot_formula '
             'test_gradients_of_dispatch_are_those_of_each_expert_alone '
             'test_skipped_tokens_get_zero_and_finite_gradients_from_undefined_rows'),
    Exercise('sample', 'sample.sample_from_logits', """
        Sample by the inverse-CDF method. Sort softmax(logits / temperature) in descending order. Keep a token if the
        likelier ones sum to less than top_p, if its probability is at least min_p times the largest, and if it is one
        of the first top_k (0: all); always keep the likeliest. Return the first kept token whose cumulative kept
        probability exceeds u times the total. temperature 0: the likeliest. If a logit is NaN or the largest is
        infinite: -1. A tiny temperature must not overflow.""",
             'torch.searchsorted(cdf, values, right=True) is the first index with cdf > value.',
             'test_sample: test_temperature_zero_takes_the_likeliest '
             'test_shares_of_u_are_the_renormalised_probabilities '
             'test_an_excluded_token_is_never_drawn test_a_u_between_two_tokens_belongs_to_the_second '
             'test_the_largest_u_gives_a_kept_token test_the_smallest_temperatures_take_the_likeliest '
             'test_logits_that_are_not_finite_draw_nothing test_rows_are_drawn_independently'),
    Exercise('orthogonalize', 'optim.orthogonalize', """
        G (..., m, n) -> the same singular vectors, singular values near 1, for each matrix of a stack:
        X = G / |G| (Frobenius), then  X <- a X + b (X X^T) X + c (X X^T)^2 X  for each a, b, c of `coefficients`.
        Transpose a tall matrix first, and back at the end: X X^T is then the smaller product.""",
             'X.norm(dim=(-2, -1), keepdim=True) is one norm per matrix; clamp it, since a gradient may be zero.',
             'test_optim: test_the_update_has_singular_values_near_1 test_the_update_keeps_the_singular_vectors '
             'test_each_expert_of_a_stack_is_a_matrix_of_its_own'),
    Exercise('muon', 'optim.Muon.step', """
        For each p of each of self.param_groups, with m = self.state[p]['momentum'], zero at first:
            m <- momentum m + (1 - momentum) grad;   u = momentum m + (1 - momentum) grad    (Nesterov)
            p <- (1 - lr weight_decay) p - lr 0.2 sqrt(max(rows, columns)) orthogonalize(u)
        [Z8] IV-A; arXiv 2502.16982 for the scale. p is a matrix, or a stack of matrices. A loop over parameters is
        enough; stacking those of one shape is faster.""",
             'a.lerp_(b, w) is a <- (1 - w) a + w b, in place: each average is one lerp.',
             'test_optim: test_muon_equals_torch_s_own_for_each_of_many_matrices test_an_update_has_adamw_s_rms'),
    Exercise('trim', 'data.reasoning.ap_trim', """
        Return (sample, rule) for the first of these rules that gives a sample of at most `budget` tokens. [Z8] III.
            'kept'              the unchanged sample
            'cut'               the last turn's reasoning is cut at its end: cut_last
            'earlier dropped'   earlier turns lose their reasoning, the last turn's is cut
            'dropped'           None: questions and answers alone are too long""",
             'cut_last returns None if even that does not fit; turn._replace(think=[]) drops the reasoning of a turn.',
             'test_reasoning: test_fitting_sample_is_untouched test_ap_trimming_is_the_four_rules_tried_in_turn '
             'test_every_question_and_answer_survives_whole'),
    Exercise('rsa', 'rsa.rounds_of', """
        Run rounds 0 to T of settings.resolved(), and yield a list of one Round per question after each. [Z8] VI. In
        each round, for each question, sample_candidates, then new_candidate for each result. Call generate ONCE, for
        the prompts of all questions that are not None, with the budget, in round T final_budget. From each output set
        the candidate's output, answer and tail: the last `tail` tokens of policy.thought_of(output), or of the answer
        if compact is 'answer' and there is one. Round.tokens is the number of generated tokens. Each question has its
        own generator, random.Random(f'{settings.seed} {list(question)}'), which samples for the rounds in `done`, too,
        though nothing else is done for these. Without questions, or with an empty one, raise ValueError.""",
             'One loop over rounds; sample for all questions before you check `done`.',
             'test_rsa: test_without_rounds_it_is_parallel_sampling test_one_candidate_carries_its_own_tail '
             'test_candidates_are_sampled_without_replacement_from_the_population test_the_record_is_what_happened '
             'test_seeds_reproduce_the_samples_and_questions_have_their_own '
             'test_more_rounds_start_with_the_same_rounds '
             'test_compact_answer_passes_on_the_answer_of_the_finished_and_the_tail_of_others '
             'test_a_chain_that_ended_without_an_answer_gets_another_try '
             'test_what_makes_no_sense_is_refused_in_one_line'),
    Exercise('vote', 'tasks.problems.majority_vote', """
        Return the most frequent answer, the first of them if there are several; equal(a, b) compares two answers. None
        does not count as a vote; without votes, return None.""",
             'max(..., key=...) returns the first of the largest.',
             'test_rsa: test_majority_is_the_first_of_the_most_frequent test_majority_by_example'),
]
