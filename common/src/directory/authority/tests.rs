use super::super::message::Standing;
use super::super::testing::{EPOCH_SECONDS, Person, authority_key, endorsed, rules, sorted};
use super::super::{Invitation, MemberKind};
use super::*;
use crate::topology::sign;

const EPOCH: u64 = 1000;

fn people() -> Vec<Person> {
    let mut people: Vec<_> = (1..=3).map(Person::mix).collect();
    people.extend([Person::gateway(11), Person::gateway(12), Person::provider(21, 11)]);
    people
}

fn admission() -> Admission {
    Admission::new(people().iter().map(|person| (person.key().identity(), person.kind())))
}

/// When making the document of [`EPOCH`] begins.
fn begin() -> Duration {
    rules(1, 1).round_start(EPOCH)
}

/// A quarter of an epoch before: what was held then must be in the document.
fn before() -> Duration {
    begin() - Duration::from_secs(EPOCH_SECONDS / 4)
}

fn start(number: u8, count: u8, threshold: usize, memory: Memory<'_>, now: Duration) -> Authority {
    let rules = rules(count, threshold);
    let latest = document_before(count, &rules);
    let latest = Some(latest.as_bytes());
    Authority::new(authority_key(number), rules, admission(), latest, memory, now).unwrap()
}

/// The document of the epoch before [`EPOCH`], signed by all authorities.
fn document_before(count: u8, rules: &Rules) -> String {
    let keys: Vec<_> = (0..count).map(authority_key).collect();
    let keys: Vec<_> = keys.iter().collect();
    let published = (EPOCH - 1) * EPOCH_SECONDS;
    let candidates = people()
        .iter()
        .map(|person| endorsed(person.signed(published), &keys[..rules.authorities().threshold()]))
        .collect();
    sign(&assemble(rules, None, &sorted(candidates), EPOCH - 1).unwrap(), &keys)
}

#[test]
fn the_first_document_is_made_as_soon_as_there_are_members() {
    for into_the_epoch in [0, 1, EPOCH_SECONDS - 1] {
        let now = Duration::from_secs(EPOCH * EPOCH_SECONDS + into_the_epoch);
        let first = |n| {
            let rules = rules(3, 2);
            Authority::new(authority_key(n), rules, admission(), None, Memory::New, now).unwrap()
        };
        let mut three = [0, 1, 2].map(first);
        for authority in &mut three {
            authority.handle_timeout(now);
            assert!(authority.poll_timeout() > now, "it would spin");
        }
        assert!(talk(&mut three, now).is_empty());
        fill(&mut three, now);
        assert_eq!(talk(&mut three, now).len(), 3);
        let latest = three[0].latest().unwrap();
        assert_eq!(latest.topology().epoch, EPOCH);
        assert_eq!(latest.check_time(UnixTime(now.as_secs())), Ok(()));
    }
}

/// Gives all authorities the descriptors of all, with the endorsements of all.
fn fill(authorities: &mut [Authority], now: Duration) {
    for person in people() {
        let descriptor = person.signed(now.as_secs());
        let text = descriptor.text().as_bytes();
        let mut endorsements = Vec::new();
        for _ in 0..2 {
            for authority in authorities.iter_mut() {
                let published = authority.publish(text, &endorsements, None, now).unwrap();
                endorsements.push(published.endorsement);
            }
        }
    }
}

fn outputs(authority: &mut Authority) -> Vec<Output> {
    std::iter::from_fn(|| authority.poll_output()).collect()
}

fn statuses(outputs: &[Output], rules: &Rules) -> Vec<Status> {
    let status = |output: &Output| match output {
        Output::Send { message, .. } => match Message::parse(message, rules) {
            Ok((_, Message::Status(status))) => Some(status),
            _ => None,
        },
        _ => None,
    };
    outputs.iter().filter_map(status).collect()
}

/// Takes the record that is to be persisted, if there is one.
fn record(outputs: &[Output]) -> Option<Vec<u8>> {
    outputs.iter().find_map(|output| match output {
        Output::Persist(record) => Some(record.clone()),
        _ => None,
    })
}

/// Lets authorities talk, without loss or delay, until nothing is left to say.
fn talk(authorities: &mut [Authority], now: Duration) -> Vec<(Identity, String)> {
    let mut published = Vec::new();
    loop {
        let mut quiet = true;
        for at in 0..authorities.len() {
            for output in outputs(&mut authorities[at]) {
                quiet = false;
                match output {
                    Output::Persist(_) => authorities[at].persisted(now),
                    Output::Publish(file) => published.push((authorities[at].identity(), file)),
                    Output::Send { to, message } => {
                        let receiver = authorities.iter_mut().find(|a| a.identity() == to);
                        if let Some(receiver) = receiver {
                            let _ = receiver.handle_message(&message, now);
                        }
                    }
                }
            }
        }
        if quiet {
            return published;
        }
    }
}

/// Who comes late, without a document, waits for what the others may have.
#[test]
fn who_has_no_document_first_listens() {
    let now = Duration::from_secs(EPOCH * EPOCH_SECONDS);
    let rules = rules(3, 2);
    let late = |n| {
        Authority::new(authority_key(n), rules.clone(), admission(), None, Memory::New, now)
            .unwrap()
    };
    let mut two = [late(0), late(1)];
    for authority in &mut two {
        authority.handle_timeout(now);
    }
    fill(&mut two, now);
    // The third one is silent: it may be the one that has a document.
    assert!(talk_from(&mut two, now).is_empty());
    let mut at = now;
    while two[0].latest().is_none() {
        at = two.iter().map(Authority::poll_timeout).min().unwrap().max(at);
        talk_from(&mut two, at);
    }
    assert!(at >= now + FIRST_WAIT * rules.attempt_time(), "{:?}", at - now);
    assert!(at < now + 6 * rules.attempt_time(), "{:?}", at - now);
}

#[test]
fn three_authorities_make_one_document_at_once() {
    let mut three: Vec<_> = (0..3).map(|n| start(n, 3, 2, Memory::New, before())).collect();
    fill(&mut three, before());
    for authority in &mut three {
        authority.handle_timeout(begin());
    }
    let published = talk(&mut three, begin());
    assert_eq!(published.len(), 3);
    let latest = three[0].latest().unwrap();
    assert_eq!(latest.topology().nodes().len(), 5);
    assert!(three.iter().all(|authority| authority.latest().unwrap().digest() == latest.digest()));
    let status = three[0].status(begin() + Duration::from_secs(EPOCH_SECONDS / 4));
    let until = UnixTime((EPOCH + 4) * EPOCH_SECONDS);
    assert_eq!((status.epoch, status.in_force), (EPOCH, Some((EPOCH, until))));
    assert_eq!((status.making, status.problem), (None, None));
    assert!(status.last_heard.iter().all(|(_, heard)| *heard == Some(begin())));
}

#[test]
fn nothing_leaves_before_it_is_on_the_disk() {
    let rules = rules(1, 1);
    let mut one = [start(0, 1, 1, Memory::New, before())];
    fill(&mut one, before());
    let [authority] = &mut one;
    authority.handle_timeout(begin());
    // Begun, voted, signed: one record after the other, and the document only after the last.
    for stage in 0..3 {
        let outputs = outputs(authority);
        assert!(record(&outputs).is_some(), "{stage}");
        assert!(!outputs.iter().any(|output| matches!(output, Output::Publish(_))), "{stage}");
        authority.handle_timeout(begin() + Duration::from_secs(1));
        assert!(authority.poll_output().is_none(), "{stage}");
        authority.persisted(begin() + Duration::from_secs(1));
    }
    assert!(outputs(authority).iter().any(|output| matches!(output, Output::Publish(_))));
    let mut two = [start(0, 2, 2, Memory::New, before()), start(1, 2, 2, Memory::New, before())];
    fill(&mut two, before());
    two[0].handle_timeout(begin());
    let begun = outputs(&mut two[0]);
    assert!(statuses(&begun, &rules).is_empty() && record(&begun).is_some());
}

#[test]
fn a_restart_before_the_signature_left_never_leads_to_another_document() {
    let rules = rules(1, 1);
    let mut one = [start(0, 1, 1, Memory::New, before())];
    fill(&mut one, before());
    let [authority] = &mut one;
    authority.handle_timeout(begin());
    let mut signed = None;
    for _ in 0..3 {
        signed = record(&outputs(authority));
        authority.persisted(begin());
    }
    let file = outputs(authority).into_iter().find_map(|output| match output {
        Output::Publish(file) => Some(file),
        _ => None,
    });
    let first = read(file.unwrap().as_bytes(), &rules).unwrap();
    // The record of the signature is on the disk, the document is not; members have changed since.
    let record = signed.unwrap();
    let mut again = [start(0, 1, 1, Memory::Record(&record), begin())];
    let published = talk_from(&mut again, begin());
    let [(_, file)] = &published[..] else { panic!("one document: {published:?}") };
    assert_eq!(read(file.as_bytes(), &rules).unwrap().digest(), first.digest());
    for end in (0..record.len()).step_by(61) {
        let memory = Memory::Record(&record[..end]);
        let result =
            Authority::new(authority_key(0), rules.clone(), admission(), None, memory, begin());
        assert_eq!(result.unwrap_err(), NewAuthorityError::Record, "cut at {end}");
    }
}

fn talk_from(authorities: &mut [Authority], now: Duration) -> Vec<(Identity, String)> {
    for authority in authorities.iter_mut() {
        authority.handle_timeout(now);
    }
    talk(authorities, now)
}

#[test]
fn who_lost_its_record_lets_the_documents_pass_that_it_may_have_signed() {
    let rules = rules(1, 1);
    let mut one = [start(0, 1, 1, Memory::Lost, begin())];
    fill(&mut one, begin());
    assert_eq!(talk_from(&mut one, begin()), []);
    assert_eq!(one[0].poll_timeout().min(rules.round_start(EPOCH + 1)), one[0].poll_timeout());
    let next = rules.round_start(EPOCH + 1);
    assert_eq!(talk_from(&mut one, next - Duration::from_secs(1)), []);
    assert_eq!(talk_from(&mut one, next).len(), 1);
}

#[test]
fn a_leader_that_lacks_a_descriptor_gets_it_and_the_next_attempt_has_it() {
    let mut two: Vec<_> = (0..2).map(|n| start(n, 2, 2, Memory::New, before())).collect();
    fill(&mut two, before());
    // Whoever is first comes back from a restart without its members.
    let first = rules(2, 2).leader(EPOCH, 0).to_owned();
    let number = two.iter().position(|authority| authority.identity() == first).unwrap();
    two[number] = start(u8::try_from(number).unwrap(), 2, 2, Memory::New, before());
    assert_eq!(talk_from(&mut two, begin()), []);
    let mut now = begin();
    let mut published = Vec::new();
    for _ in 0..20 {
        now = two.iter().map(Authority::poll_timeout).min().unwrap().max(now);
        published.extend(talk_from(&mut two, now));
    }
    assert_eq!(published.len(), 2, "{:?}", two[number].status(now));
    assert_eq!(two[0].latest().unwrap().topology().nodes().len(), 5);
}

/// What a leader shows to one authority and not to the other would, if votes could not move on, cost
/// the epoch.
#[test]
fn a_leader_with_two_faces_costs_an_attempt_but_not_the_epoch() {
    let rules = rules(3, 2);
    let keys = || (0..3).map(authority_key);
    let leader = *rules.leader(EPOCH, 0);
    let liar = keys().find(|key| key.identity() == leader).unwrap();
    let honest: Vec<u8> = (0..3).filter(|n| authority_key(*n).identity() != leader).collect();
    let mut two: Vec<_> = honest.iter().map(|n| start(*n, 3, 2, Memory::New, before())).collect();
    fill(&mut two, before());
    let sender = Sender { key: &liar, network: rules.network() };
    let mut digests = Vec::new();
    for authority in &mut two {
        authority.handle_timeout(begin());
        // Another version of the provider for each.
        let mut candidates = authority.members.current(&rules, EPOCH);
        let provider = Person::provider(21, 11);
        let mut descriptor = provider.descriptor(before().as_secs() + 1);
        let super::super::Member::Provider(advert) = &mut descriptor.member else {
            panic!("a provider")
        };
        advert.policy = format!("face {}", digests.len());
        let changed = descriptor.sign(&provider.key()).unwrap();
        let identity = changed.identity();
        let at = candidates.iter().position(|c| c.descriptor.identity() == identity).unwrap();
        candidates[at].descriptor = changed;
        let latest = authority.latest.as_ref();
        let body = assemble(&rules, latest, &candidates, EPOCH).unwrap().body();
        digests.push(body.digest());
        let draft = Draft { body, candidates };
        let proposal = Proposal { epoch: EPOCH, attempt: 0, statuses: Vec::new(), draft };
        assert_eq!(authority.handle_message(&sender.proposal(&proposal), begin()), Ok(()));
        let voted = authority.round.as_ref().unwrap().vote.unwrap().digest;
        assert_eq!(Some(&voted), digests.last());
    }
    assert_ne!(digests[0], digests[1]);
    assert_eq!(talk(&mut two, begin()), []);
    let mut now = begin();
    let mut published = Vec::new();
    while published.len() < 2 {
        now = two.iter().map(Authority::poll_timeout).min().unwrap().max(now);
        assert!(now < begin() + 3 * rules.attempt_time());
        published.extend(talk_from(&mut two, now));
    }
    let [first, second] = [0, 1].map(|at: usize| two[at].latest().unwrap().digest());
    assert!(first == second && digests.contains(&first));
}

#[test]
fn who_was_away_is_brought_the_document() {
    let mut three: Vec<_> = (0..3).map(|n| start(n, 3, 2, Memory::New, before())).collect();
    fill(&mut three, before());
    let away = three.pop().unwrap();
    for _ in 0..3 {
        let now = three.iter().map(Authority::poll_timeout).max().unwrap().max(begin());
        talk_from(&mut three, now);
    }
    let digest = three[0].latest().expect("two are enough").digest();
    three.push(away);
    let later = begin() + Duration::from_secs(EPOCH_SECONDS / 2);
    talk_from(&mut three, later);
    assert_eq!(three[2].latest().map(SignedTopology::digest), Some(digest));
}

#[test]
fn a_second_document_of_an_epoch_is_refused_and_its_signers_are_named() {
    let mut three: Vec<_> = (0..3).map(|n| start(n, 3, 2, Memory::New, before())).collect();
    fill(&mut three, before());
    talk_from(&mut three, begin());
    let mut other = three[0].latest().unwrap().topology().clone();
    other.valid_until = UnixTime(other.valid_until.0 - 1);
    let keys = [0, 1].map(authority_key);
    let file = sign(&other, &[&keys[0], &keys[1]]);
    let network = rules(3, 2).network().clone();
    let message = Sender { key: &keys[1], network: &network }.document(&file);
    let signers = three[2].latest().unwrap().signers().clone();
    let refused = three[2].handle_message(&message, begin());
    assert_eq!(refused, Err(MessageError::TwoDocuments(EPOCH)));
    let named = three[2].status(begin()).signed_twice;
    let both = keys.iter().map(IdentityKey::identity).filter(|key| signers.contains(key));
    assert_eq!(named.len(), both.clone().count());
    assert!(both.clone().count() >= 1);
    assert!(both.into_iter().all(|key| named.contains(&(key, EPOCH))));
}

#[test]
fn contradictions_and_wrong_turns_are_seen() {
    let mut authority = start(0, 3, 2, Memory::New, before());
    authority.handle_timeout(begin());
    let (liar, network) = (authority_key(1), rules(3, 2).network().clone());
    let sender = Sender { key: &liar, network: &network };
    let vote = |digest: u8, attempt: u8| {
        let vote =
            Vote { attempt: 0, digest: crate::topology::DocumentDigest::from_bytes([digest; 32]) };
        Standing { latest: 0, epoch: EPOCH, attempt, vote: Some(vote), signed: None }
    };
    for (digest, attempt) in [(1, 0), (1, 1), (2, 1)] {
        let message = sender.status(begin(), vote(digest, attempt)).message();
        assert_eq!(authority.handle_message(&message, begin()), Ok(()));
        let caught = authority.status(begin()).signed_twice == [(liar.identity(), EPOCH)];
        assert_eq!(caught, digest == 2);
    }
    let draft = || Draft {
        body: crate::topology::DocumentBody::from_text(String::new()),
        candidates: vec![],
    };
    for attempt in 0..6 {
        let proposal = Proposal { epoch: EPOCH, attempt, statuses: vec![], draft: draft() };
        let result = authority.handle_message(&sender.proposal(&proposal), begin());
        let turn = *rules(3, 2).leader(EPOCH, attempt) == liar.identity();
        match (turn, attempt) {
            (false, _) => assert_eq!(result, Err(MessageError::NotItsTurn(liar.identity()))),
            (true, 0) => assert!(matches!(result, Err(MessageError::Refused { .. }))),
            (true, _) => assert_eq!(result, Err(MessageError::NoMandate(liar.identity()))),
        }
    }
    let ahead = Standing { epoch: EPOCH + 2, ..vote(1, 0) };
    let result = authority.handle_message(&sender.status(begin(), ahead).message(), begin());
    assert!(matches!(result, Err(MessageError::Ahead { .. })));
}

#[test]
fn a_clock_that_is_behind_joins_and_one_far_ahead_is_ignored() {
    let rules = rules(3, 2);
    let early = begin() - Duration::from_secs(120);
    let (other, network) = (authority_key(1), rules.network().clone());
    let standing = Standing { latest: 0, epoch: EPOCH, attempt: 0, vote: None, signed: None };
    let message = Sender { key: &other, network: &network }.status(begin(), standing).message();
    let mut authority = start(0, 3, 2, Memory::New, before());
    let too_early = early - Duration::from_secs(1);
    let ahead = MessageError::Ahead { from: other.identity(), epoch: EPOCH };
    assert_eq!(authority.handle_message(&message, too_early), Err(ahead));
    assert_eq!(authority.status(too_early).making, None);
    assert_eq!(authority.handle_message(&message, early), Ok(()));
    assert_eq!(authority.status(early).making, Some((EPOCH, 0)));
}

#[test]
fn uploads_are_admitted_replaced_and_bounded_in_time() {
    let now = before();
    let mut authority = start(0, 1, 1, Memory::New, now);
    let publish = |authority: &mut Authority, person: Person, seconds: u64, invitation| {
        let text = person.signed(seconds).text().to_owned();
        authority.publish(text.as_bytes(), &[], invitation, now)
    };
    let (mix, seconds) = (Person::mix(1), now.as_secs());
    let published = publish(&mut authority, mix, seconds, None).unwrap();
    assert_eq!(published.admitted, Admitted::Known);
    let epoch = rules(1, 1).parameters().epochs.at(UnixTime(seconds));
    assert_eq!(published.endorsement.until, epoch + ENDORSED_EPOCHS - 1);
    assert_eq!(publish(&mut authority, mix, seconds, None), Ok(published));
    let older = publish(&mut authority, mix, seconds - 1, None);
    assert_eq!(older, Err(PublishError::NotNewer(seconds)));
    assert!(publish(&mut authority, mix, seconds + 120, None).is_ok());
    let future = publish(&mut authority, mix, seconds + 121, None);
    assert!(matches!(future, Err(PublishError::Descriptor(DescriptorError::Future { .. }))));

    let stranger = Person::mix(9);
    let identity = stranger.key().identity();
    let refused = publish(&mut authority, stranger, seconds, None);
    assert_eq!(refused, Err(PublishError::NotAdmitted(NotAdmitted(identity))));
    let invitation = Invitation::from_bytes([7; 32]);
    let mut admission = admission();
    admission.invite(invitation.hash(&authority.identity()), MemberKind::Mix, None).unwrap();
    authority.set_admission(admission);
    let presented = invitation.present(&authority.identity(), &identity);
    let published = publish(&mut authority, stranger, seconds, Some(&presented)).unwrap();
    assert!(matches!(published.admitted, Admitted::Invited(_)));
    // Nothing of the invitation is in what others get.
    let held = authority.members();
    assert!(!held.windows(32).any(|window| window == presented.as_bytes()));
    assert!(!held.windows(32).any(|window| window == invitation.as_bytes()));
}

#[test]
fn members_survive_a_restart_unless_they_have_become_too_old() {
    let mut one = [start(0, 1, 1, Memory::New, before())];
    fill(&mut one, before());
    let held = one[0].members();
    let mut again = start(0, 1, 1, Memory::New, begin());
    again.restore_members(&held, begin()).unwrap();
    assert_eq!(again.members(), held);
    let late = before() + Duration::from_secs(3 * EPOCH_SECONDS + 1);
    let mut late_one = start(0, 1, 1, Memory::New, late);
    late_one.restore_members(&held, late).unwrap();
    assert_eq!(late_one.members(), [0; 4]);
    for end in (0..held.len()).step_by(61) {
        let result = again.restore_members(&held[..end], begin());
        assert_eq!(result, Err(MessageError::Malformed), "cut at {end}");
    }
}

#[test]
fn a_stranger_is_no_authority() {
    let key = authority_key(9);
    let identity = key.identity();
    let result = Authority::new(key, rules(3, 2), admission(), None, Memory::New, begin());
    assert_eq!(result.unwrap_err(), NewAuthorityError::NotAnAuthority(identity));
}

#[test]
fn an_authority_holds_a_bounded_number_of_descriptors() {
    let mut one = start(0, 1, 1, Memory::New, before());
    let publish = |one: &mut Authority, person: Person| {
        let descriptor = person.signed(before().as_secs());
        one.publish(descriptor.text().as_bytes(), &[], None, before()).map(drop)
    };
    one.members = Members::full(&Person::mix(1).signed(before().as_secs()));
    assert_eq!(publish(&mut one, Person::mix(2)), Err(PublishError::Full));
    // A place that comes free is taken, and who has one keeps it.
    let mut seed = [9; 32];
    seed[..8].fill(0);
    one.forget(&IdentityKey::from_bytes(&seed).identity());
    assert_eq!(publish(&mut one, Person::mix(2)), Ok(()));
    assert_eq!(publish(&mut one, Person::mix(3)), Err(PublishError::Full));
    assert_eq!(publish(&mut one, Person::mix(2)), Ok(()));
}
